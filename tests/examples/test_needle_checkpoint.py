"""The checkpoint that ships: its files agree with each other, and it finds keys."""

import json

import jax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from loongjax.models.config import ModelConfig as ServedConfig
from loongjax.models.shipped import resolve_checkpoint
from needle import text
from needle.accuracy import Variant, find_right
from needle.model import ModelConfig, load_params, param_shapes, plain_attention
from needle.prompts import PromptWriter
from needle.tokenizer import BOS, BOS_ID, EOS, EOS_ID, train_tokenizer

FOLDER = resolve_checkpoint(None)
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
CONFIG = ModelConfig()


@pytest.fixture(scope="module")
def served_tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def shipped() -> Variant:
    return Variant(params=load_params(FOLDER), attend=plain_attention, tokens_per_pass=8192)


@pytest.mark.parametrize("length", [64, 128, 256, 512, 1024])
def test_it_finds_unseen_keys_at_all_depths(shipped, length):
    writer = PromptWriter(TOKENIZER, seed=2024)
    examples = [found for _, found in writer.spread_examples(length, 33)]
    with jax.default_matmul_precision("highest"):
        assert sum(find_right(shipped, CONFIG, TOKENIZER, examples)) >= len(examples) - 1


def test_it_is_a_few_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4e6


def test_the_files_of_the_folder_are_those_of_hugging_face():
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in FOLDER.iterdir()} == names


def test_config_and_weights_are_those_of_the_script(shipped):
    assert json.loads((FOLDER / "config.json").read_text()) == CONFIG.hugging_face()
    assert {name: value.shape for name, value in shipped.params.items()} == param_shapes(CONFIG)


def test_tensor_parallelism_of_1_2_and_4_divides_it():
    served = ServedConfig.from_checkpoint(FOLDER)
    for tp in (1, 2, 4):
        served.check_tp(tp)


def test_the_script_makes_the_same_tokenizer_again():
    assert json.loads(train_tokenizer(0).to_str()) == json.loads(TOKENIZER.to_str())


def test_special_tokens_have_the_same_ids_everywhere(served_tokenizer):
    config = json.loads((FOLDER / "config.json").read_text())
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    for source in (config, generation):
        assert (source["bos_token_id"], source["eos_token_id"]) == (BOS_ID, EOS_ID)
    assert (served_tokenizer.bos_token, served_tokenizer.eos_token) == (BOS, EOS)
    assert (served_tokenizer.bos_token_id, served_tokenizer.eos_token_id) == (BOS_ID, EOS_ID)
    assert len(served_tokenizer) == config["vocab_size"]


@given(st.text(max_size=200).filter(lambda written: BOS not in written and EOS not in written))
@example("The secret key of Paris is 4821-7306.")
@example(" two  spaces, a\ttab and \r\n lines \u200d \U0001f600 \x00")
def test_any_text_comes_back_from_its_tokens(served_tokenizer, written):
    ids = served_tokenizer.encode(written)
    assert ids[0] == BOS_ID
    assert served_tokenizer.decode(ids, skip_special_tokens=True) == written
    assert TOKENIZER.decode(ids[1:]) == written


def test_every_character_of_an_answer_is_one_token():
    for character in set(text.answer(text.KEY_TEMPLATE)) | set("0123456789"):
        assert len(TOKENIZER.encode(character, add_special_tokens=False).ids) == 1
    answer = text.answer("4821-7306")
    assert len(TOKENIZER.encode(f"Answer:{answer}", add_special_tokens=False).ids) == 2 + len(answer)


def test_a_chat_is_the_same_prompt_as_a_completion(served_tokenizer):
    found = PromptWriter(TOKENIZER, seed=1).examples(200, 0.5, 1)[0]
    message = found.prompt.removesuffix(f" {text.ANSWER_CUE}")
    chat = served_tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False
    )
    reply = served_tokenizer.encode(found.answer.lstrip(), add_special_tokens=False)
    whole = served_tokenizer.encode(f"{message}\n{text.ANSWER_CUE}{found.answer}")
    assert chat + reply == whole


def test_it_finds_keys_in_a_chat_too(shipped):
    examples = PromptWriter(TOKENIZER, seed=3).examples(300, 0.4, 16)
    cue = f" {text.ANSWER_CUE}"
    chats = [
        type(found)(prompt=found.prompt.removesuffix(cue) + f"\n{text.ANSWER_CUE}", answer=found.answer)
        for found in examples
    ]
    assert sum(find_right(shipped, CONFIG, TOKENIZER, chats)) >= len(chats) - 1


def test_earlier_turns_of_a_chat_keep_their_answers(served_tokenizer):
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "4821-7306."},
        {"role": "user", "content": "And now?"},
    ]
    written = served_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert written == "<s>Who?\nAnswer: 4821-7306.</s>\nAnd now?\nAnswer: "
