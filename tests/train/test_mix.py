"""``veneer mix``: from folders of trained LoRAs to a mixture that is trained, resumed, loaded and asked."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.cli.main import main
from veneer.hf.routing import routing
from veneer.methods.mole import MoleConfig
from veneer.train import mixing


def lora(base, folder, seed, **options):
    torch.manual_seed(seed)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def library(base, tmp_path_factory):
    """A folder of three LoRAs, two of rank 2."""
    folder = tmp_path_factory.mktemp("library")
    for seed, (name, r) in enumerate({"red": 2, "green": 2, "wide": 4}.items()):
        lora(base, folder / name, seed, r=r)
    return folder


def run(*words):
    main(["mix", *map(str, words), "--eval.prompts", "1", "--eval.max-new-tokens", "4", "--log.progress", "off"])


def loaded(base, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def logits(model):
    return model(torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize(
    ("method", "trained"), [("mole", ("mole_gate", "mole_log_tau")), ("xlora", ("internal_xlora_classifier",))]
)
def test_gates_train_resume_and_answer(method, trained, base, library, facts, tmp_path, capsys):
    words = ["--adapters", library, "--method", method, "--data", facts, "--steps", 4, "--lr", "3e-2"]
    words += ["--train.save-every", 2, "--eval.every", 2, "--train.keep", 9, "--train.gradient-checkpointing"]
    run(*words, "--out", tmp_path / "whole")
    tables = [json.loads(one)["routing"] for one in (tmp_path / "whole/metrics.jsonl").open() if '"routing":' in one]
    assert len(tables) == 2 and tables[0]["experts"] == ["green", "red", "wide"]
    model = loaded(base, tmp_path / "whole")
    model.set_adapter("default")
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names and all(any(part in n for part in trained) for n in names)

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/checkpoint-4")
    text = (tmp_path / "cut/run.yaml").read_text()
    (tmp_path / "cut/run.yaml").write_text(text.replace(str(tmp_path / "whole"), str(tmp_path / "cut")))
    main(["train", str(tmp_path / "cut/run.yaml"), "--resume"])
    assert torch.equal(logits(loaded(base, tmp_path / "cut")), logits(loaded(base, tmp_path / "whole")))

    capsys.readouterr()
    main(["generate", "What colour is the sky 3", "--adapter", str(tmp_path / "whole"), "-n", "3"])
    assert capsys.readouterr().out.strip()


def test_arrow_needs_no_training_and_its_folder_is_whole(base, library, facts, tmp_path):
    run("--adapters", library, "--method", "arrow", "--adapter.top_k", 1, "--data", facts, "--out", tmp_path / "a")
    report = json.loads((tmp_path / "a/report.json").read_text())
    assert report["steps"] == 0 and report["loss_after"] != report["loss_before"]
    model = loaded(base, tmp_path / "a")
    assert set(model.peft_config) == {"default", "green", "red", "wide"}
    uses = routing(model, {"input_ids": torch.tensor([[5, 6, 7, 8]])})
    assert len(uses) == 4 and all(use.entropy == 0 for use in uses)
    assert (tmp_path / "a/report.html").is_file()


def test_rules_and_the_search_make_one_plain_lora(base, library, facts, tmp_path):
    two = f"{library / 'red'},{library / 'green'}"
    run("--adapters", two, "--method", "cat", "--adapter.weights", "[1,0.5]", "--out", tmp_path / "cat")
    found = loaded(base, tmp_path / "cat")
    assert list(found.peft_config) == ["default"] and found.peft_config["default"].peft_type == "LORA"
    wanted = AutoModelForCausalLM.from_pretrained(base)
    for name, weight in (("red", 1.0), ("green", 0.5)):
        merged = loaded(base, library / name).merge_and_unload().state_dict()
        plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
        for key, value in wanted.state_dict().items():
            value += weight * (merged[key] - plain[key])
    assert torch.allclose(logits(found), logits(wanted), atol=1e-5)
    pytest.importorskip("cma")
    run("--adapters", two, "--method", "lorahub", "--adapter.steps", 5, "--data", facts, "--out", tmp_path / "hub")
    assert list(loaded(base, tmp_path / "hub").peft_config) == ["default"]


def test_prompts_are_rendered_as_the_adapters_were_trained(library, tmp_path):
    shutil.copytree(library, tmp_path / "own")
    for name in ("red", "green", "wide"):
        (tmp_path / "own" / name / "run.yaml").write_text("data: {system: Say it., template: chat}\n")
    named = mixing.experts([str(tmp_path / "own")])
    assert mixing.defaults(named)["data.system"] == "Say it."
    (tmp_path / "own/red/run.yaml").write_text("data: {system: Sing it., template: chat}\n")
    found = mixing.defaults(named)
    assert "data.system" not in found and found["data.template"] == "chat" and "tiny-llama" in found["model.path"]


def test_what_cannot_be_mixed_is_one_sentence(base, library, facts, tmp_path, capsys):
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        MoleConfig(adapters={"r": str(library / "red")}, task_type="CAUSAL_LM"),
    ).save_pretrained(tmp_path / "mole")
    other = lora(base, tmp_path / "other", 7)
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "an/other-model"}))
    both = [library / "red", library / "wide"]
    for words, sentence in (
        (["--data", facts], "Say which adapters"),
        (["--adapters", library / "red"], "needs two adapters or more"),
        (["--adapters", *both, "--method", "moel"], "no method 'moel'; trained LoRAs are mixed by mole, xlora, arrow"),
        (["--adapters", *both, "--method", "mixlora"], "veneer train --adapter.method mixlora"),
        (["--adapters", *both, tmp_path / "mole"], "is MOLE; only LoRA"),
        (["--adapters", *both, other], "different base models"),
        (["--adapters", *both, library / "red"], "Two adapters are called 'red'"),
        (["--adapters", *both, tmp_path / "nothing"], "'" + str(tmp_path / "nothing") + "'"),
        (["--adapters", *both, "--data", facts, "--adapter.gat", "token"], "did you mean gate"),
        (["--adapters", *both, "--method", "xlora", "--data", facts, "--adapter.top_k_lora", 3], "experts, 2"),
        (["--adapters", *both, "--method", "arrow", "--adapter.top_k", 4], "above the number of experts, 2"),
        (["--adapters", *both, "--method", "arrow", "--adapter.topk", 1], "did you mean top_k"),
        (["--adapters", *both, "--method", "ties"], "--adapter.density 0.5"),
        (["--adapters", *both, "--method", "cat", "--adapter.weights", "[1]"], "1 entries for 2 adapters"),
        (["--adapters", *both, "--method", "lorahub"], "--data FILE"),
        (["--adapters", *both, "--method", "lorahub", "--data", facts], "other layers or ranks"),
        (["--adapters", *both, "--method", "cat", "--resume"], "nothing to resume"),
    ):
        with pytest.raises(SystemExit):
            run(*words, "--out", tmp_path / "out")
        said = capsys.readouterr().err
        assert sentence in said and "Traceback" not in said, said
