"""The table of third-party calls in docs/ecosystem.md, made from the tests that show them.

python tests/hf/ecosystem.py     writes it, with the versions that are installed
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"
START, END = "<!-- table -->", "<!-- end of table -->"
TRAINER, UNDER, LIBRARIES = "tests/hf/with_trainer.py", "tests/hf/under_peft.py", "tests/hf/with_libraries.py"


@dataclass(frozen=True)
class Call:
    """One call of a library, and the test that shows it to work."""

    what: str
    library: str
    test: str


CALLS = [
    Call(
        "`Trainer` learns, and saves the adapter alone",
        "transformers",
        f"{TRAINER}::test_checkpoints_hold_the_adapter_and_are_adapters",
    ),
    Call(
        "`Trainer.train(resume_from_checkpoint=True)`",
        "transformers",
        f"{TRAINER}::test_resuming_goes_on_as_if_nothing_had_happened",
    ),
    Call("`load_best_model_at_end=True`", "transformers", f"{TRAINER}::test_the_best_model_is_loaded_at_the_end"),
    Call(
        "`gradient_checkpointing=True`",
        "transformers",
        f"{TRAINER}::test_gradient_checkpointing_changes_nothing_but_memory",
    ),
    Call(
        "`model.add_adapter`, `set_adapter`, `disable_adapters`, `delete_adapter`, `save_pretrained`, `load_adapter`",
        "transformers",
        f"{UNDER}::test_transformers_own_adapter_methods",
    ),
    Call(
        "`AutoModel….from_pretrained(adapter_folder)`",
        "transformers",
        f"{UNDER}::test_a_base_and_its_adapter_by_the_adapters_folder",
    ),
    Call(
        "`enable_peft_hotswap`, `load_adapter(hotswap=True)`",
        "transformers",
        f"{LIBRARIES}::test_transformers_swaps_in_place",
    ),
    Call("`SFTTrainer(peft_config=)`, resume", "trl", f"{TRAINER}::test_sft_by_trl"),
    Call(
        "`DPOTrainer(peft_config=)`, the base as reference",
        "trl",
        f"{TRAINER}::test_dpo_by_trl_with_the_base_as_its_reference",
    ),
    Call("`DPOTrainer` on a trained `PeftModel`", "trl", f"{TRAINER}::test_dpo_by_trl_goes_on_from_a_trained_adapter"),
    Call("`GRPOTrainer(peft_config=)`", "trl", f"{TRAINER}::test_grpo_by_trl"),
    Call("`KTOTrainer(peft_config=)`", "trl", f"{LIBRARIES}::test_kto_by_trl"),
    Call("`RewardTrainer(peft_config=)`", "trl", f"{LIBRARIES}::test_reward_by_trl"),
    Call(
        "FSDP state dicts, `adapter_only=True`",
        "accelerate",
        f"{LIBRARIES}::test_accelerate_takes_the_adapter_alone_out_of_a_model",
    ),
    Call("`fsdp_auto_wrap_policy`", "accelerate", f"{LIBRARIES}::test_accelerate_wraps_trainable_leaves_by_themselves"),
    Call("`Accelerator.prepare`", "accelerate", f"{LIBRARIES}::test_a_model_with_adapters_is_one_for_the_libraries"),
    Call(
        "`load_lora_weights`, `set_adapters`, `get_active_adapters`, `get_list_adapters`",
        "diffusers",
        f"{LIBRARIES}::test_diffusers_loads_and_chooses",
    ),
    Call("`set_adapters` with weights, also by block", "diffusers", f"{LIBRARIES}::test_diffusers_weighs_several"),
    Call("`fuse_lora`, `unfuse_lora`", "diffusers", f"{LIBRARIES}::test_diffusers_fuses_and_unfuses"),
    Call(
        "`disable_lora`, `enable_lora`, `delete_adapters`, `unload_lora_weights`",
        "diffusers",
        f"{LIBRARIES}::test_diffusers_switches_deletes_and_unloads",
    ),
    Call(
        "`enable_lora_hotswap`, `load_lora_adapter(hotswap=True)`",
        "diffusers",
        f"{LIBRARIES}::test_diffusers_swaps_in_place",
    ),
    Call(
        "`add_adapter`, `disable_adapters`, `save_pretrained`, `load_adapter`",
        "sentence-transformers",
        f"{LIBRARIES}::test_sentence_transformers_adds_saves_and_loads",
    ),
    Call("`SentenceTransformerTrainer`", "sentence-transformers", f"{LIBRARIES}::test_sentence_transformers_trains"),
]


def table() -> str:
    """The table in Markdown, with today's versions."""
    lines = ["| call | library | works | shown by |", "|---|---|---|---|"]
    for call in CALLS:
        version = importlib.metadata.version(call.library)
        lines.append(f"| {call.what} | {call.library} {version} | yes | `{call.test}` |")
    return "\n".join(lines)


if __name__ == "__main__":
    page = PAGE.read_text()
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}")
