"""Show the plan of a fine-tuning run with an adapter's JSON, and with ``--execute`` run it.

python train_with_config.py --model_path M --dataset_name D --config configs/lora_llama2_7b_rank4.json --output_dir O
"""

import sys

from veneer.cli.main import main

main(["train-with-config", *sys.argv[1:]])
