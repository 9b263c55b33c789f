"""The shipped tokenizer: byte-level BPE in which every digit and hyphen of a key is a token of its own."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from needle import text, words

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
VOCAB_SIZE = 2048
WORD_PATTERN = r"\?\n| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What no token reaches across: words with the space before them, single digits, runs of other characters and of white
space. A question mark and the end of its line are one, so that an answer is as far from its name on the next line."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
"""The generation prompt ends with a space, so that the reply is the key without one."""


def train_tokenizer(seed: int) -> Tokenizer:
    """Learns the merges from the synthetic text, then puts BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    assert (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) == (BOS_ID, EOS_ID)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_model_len: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json as transformers' AutoTokenizer reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_model_len,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _corpus(seed: int) -> list[str]:
    """Prose and, so that each becomes one token, every word of the lists again and again."""
    rng = random.Random(seed)
    lines = [text.sentence(rng, noise=0.01) for _ in range(20_000)]
    vocabulary = [word for value in vars(words).values() if isinstance(value, tuple) for word in value]
    lines += [f" {word}" for word in vocabulary] * 100
    lines += [line.lstrip() for line in lines[:20_000]]
    for name in words.CITIES * 20:
        lines += [text.key_statement(name), text.question_variant(rng, name), text.question(name)]
    return lines
