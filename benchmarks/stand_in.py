"""Write a VLM's configuration at full size, and a processor like its own, into a folder, where no hub can be reached.

    python benchmarks/stand_in.py Qwen/Qwen3-VL-2B-Instruct runs/qwen3-vl-2b
    python benchmarks/train_throughput.py --backbone runs/qwen3-vl-2b --image-size 224 --batch-size 128 --precision bf16

There are no weights in it: the benchmarks draw them. The processor is the model's own class and prepares pictures with
the model's own settings; its tokenizer makes one token of each word and of each piece of punctuation: 31 of Qwen's
prompt for an instruction of six words, where the real one makes about 45.
"""

import argparse
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

import vlm4vla  # noqa: F401 (before transformers: beside a CPU torch it declares torchvision's operators)

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import full_size
import tiny_families

PIXELS = {  # of the models' preprocessor_config.json: fewest and most
    "qwen2_5_vl": (56 * 56, 12_845_056),
    "qwen3_vl": (1 << 16, 1 << 24),
    "qwen3_vl_moe": (1 << 16, 1 << 24),
}
NAMES = [name for name, values in full_size.CONFIGS.items() if values["kind"] in PIXELS]


def write(name: str, folder: Path) -> None:
    config = full_size.config(name)
    processor, small = tiny_families.FAMILIES[config.model_type]()
    fewest, most = PIXELS[config.model_type]
    processor.image_processor.size = {"shortest_edge": fewest, "longest_edge": most}
    tokenizer: Tokenizer = processor.tokenizer.backend_tokenizer
    tokenizer.model = models.WordLevel(tokenizer.get_vocab(with_added_tokens=False), unk_token="a")
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, key, getattr(small, key))
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write(options.name, options.folder)


if __name__ == "__main__":
    main()
