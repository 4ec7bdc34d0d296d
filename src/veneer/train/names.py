"""Names that people bring along from elsewhere, and those of models that cannot write."""

SHORT = {"out": "output.dir", "output_dir": "output.dir", "lr": "train.learning_rate"}
ELSEWHERE = {  # other tools' names -> ours
    **SHORT,
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "max_step": "train.steps",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "lr_scheduler_type": "train.schedule",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "base_model": "model.path",
    "model_name_or_path": "model.path",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.lora_alpha",
    "val_size": "data.holdout",
    "eval_steps": "eval.every",
    "save_steps": "train.save_every",
    "logging_steps": "log.every",
}

# transformers' model types that read a text both ways, so that they classify and embed but do not write.
ENCODERS = {"albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert"}
ENCODERS |= {"modernbert", "mpnet", "nomic_bert", "roberta", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl"}
