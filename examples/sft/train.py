"""Supervised fine-tuning by the flags of PEFT's example of the same name.

python examples/sft/train.py --model_name_or_path M --dataset_name D --use_peft_lora True --lora_r 8 --output_dir O
"""

import sys

from veneer.cli.main import main

main(["sft", *sys.argv[1:]])
