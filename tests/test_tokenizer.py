"""Token ids are T5's, whatever the text."""

import pickle
import random
import subprocess
import sys

import pytest

from jvdit.data.tokenizer import EOS_ID, PAD_ID, UNK_ID, Tokenizer, train_tokenizer

WEIRD = [
    "",
    "  ",
    "\n\n",
    "  leading  and   multiple spaces ",
    "trailing ",
    "line\nbreak\ttab",
    "Ｆｕｌｌｗｉｄｔｈ ①",
    "e\u0301 and \u00e9",
    "\u200bzero width",
    "\u202eright to left",
    "emoji 🦊",
    "🦊🦊 x",
    "a🦊b",
    "🦊",
    "👩‍👩‍👧 family",
    "一只猫在街上走",
    "猫 и 犬",
    "ñandú naïve café",
    "“quotes” — dash…",
    "very " + "long " * 100,
    "a" * 80,
    "\x00 control \x07",
    "\ufffd",
    "▁ underline ▁▁",
]
SPECIAL = ["</s> eos", "<pad>", "x <unk> y", "a</s>b", "<extra_id_5> token"]


@pytest.fixture(scope="module")
def captions():
    rng = random.Random(0)
    words = (
        "a red fox runs slowly over the hill at night in rain big blue drone".split()
    )
    return [" ".join(rng.choices(words, k=8)) for _ in range(400)] + ["café"] * 9


@pytest.fixture(scope="module", params=[True, False], ids=["bytes", "plain"])
def model(request, captions):
    return train_tokenizer(captions, 400, byte_fallback=request.param)


def has_bytes(model):
    return Tokenizer(model).vocab_size > 256


def test_captions_end_in_eos_and_are_cut_to_length(model):
    tokenizer = Tokenizer(model)
    whole = tokenizer.encode("a red fox runs slowly")
    assert whole[-1] == EOS_ID and whole.count(EOS_ID) == 1 and len(whole) > 4
    assert tokenizer.encode("a red fox runs slowly", 4) == [*whole[:3], EOS_ID]
    assert tokenizer.encode("a red fox", 1) == [EOS_ID]
    assert tokenizer.encode("", 8) == [EOS_ID]
    assert tokenizer.encode("a red fox runs slowly", 99) == whole  # no padding
    with pytest.raises(ValueError, match="max_length"):
        tokenizer.encode("a", 0)


def test_decoding_undoes_encoding(model):
    tokenizer = Tokenizer(model)
    ids = tokenizer.encode("a red fox")
    assert tokenizer.decode([*ids, PAD_ID, PAD_ID]) == "a red fox"
    if has_bytes(model):
        assert tokenizer.decode(tokenizer.encode("a 🦊 fox")) == "a 🦊 fox"
    with pytest.raises(ValueError, match="vocab_size"):
        tokenizer.decode([tokenizer.vocab_size])


def test_unknown_characters_are_bytes_or_one_unknown(model):
    fused = Tokenizer(model, "unk")
    # One run, whatever its length; the piece of the leading space may precede it.
    assert fused.encode("🦊🦊🦊").count(UNK_ID) == 1
    assert (UNK_ID in Tokenizer(model, "bytes").encode("🦊")) == (not has_bytes(model))


def test_special_tokens_in_text_are_text(model):
    for text in SPECIAL:
        assert Tokenizer(model).encode(text).index(EOS_ID) > 1, text


def test_training_is_deterministic(model, captions):
    again = train_tokenizer(iter(captions), 400, byte_fallback=has_bytes(model))
    assert again == model
    assert Tokenizer(again).fingerprint == Tokenizer(model).fingerprint
    assert Tokenizer(model, "unk").fingerprint != Tokenizer(model).fingerprint


def test_a_small_language_is_one_token_a_word(captions):
    tokenizer = Tokenizer(train_tokenizer(captions, 400))
    assert len(tokenizer.encode("a red fox runs slowly over the hill")) == 8 + 1
    # And what is not in it is spelled in what its words share.
    assert tokenizer.decode(tokenizer.encode("a bigger hill")) == "a bigger hill"


def test_a_large_language_is_learned_by_sentencepiece():
    rng = random.Random(0)
    letters = "abcdefghijklmnop"
    words = ["".join(rng.choices(letters, k=3)) + "ing" for _ in range(900)]
    texts = [" ".join(rng.choices(words, k=12)) for _ in range(300)]
    tokenizer = Tokenizer(train_tokenizer(texts, 600))
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert 13 < sum(lengths) / len(lengths) < 12 * 5 and tokenizer.vocab_size <= 600


def test_mistakes_are_explained(tmp_path, captions):
    with pytest.raises(ValueError, match=r"=200.*259.*try 518"):
        train_tokenizer(captions, 200)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer(["", " "], 400)
    with pytest.raises(ValueError, match="characters"):
        train_tokenizer([chr(0x4E00 + i) for i in range(900)], 300)
    with pytest.raises(ValueError, match="no sentencepiece model"):
        Tokenizer(b"not a model")
    with pytest.raises(ValueError, match="'maybe'"):
        Tokenizer(train_tokenizer(captions, 400), "maybe")


def test_processes_can_share_a_tokenizer(model):
    copy = pickle.loads(pickle.dumps(Tokenizer(model, "unk")))
    assert copy.encode("a red 🦊") == Tokenizer(model, "unk").encode("a red 🦊")


def test_command_line_trains_from_text(tmp_path, captions):
    text, output = tmp_path / "captions.txt", tmp_path / "out" / "tokenizer.model"
    text.write_text("\n".join(captions))
    command = [sys.executable, "tools/train_tokenizer.py", "--vocab_size", "400"]
    subprocess.run(
        [*command, "--output", str(output), "--captions", str(text)],
        check=True,
        cwd=__file__.rsplit("/tests/", 1)[0],
        env={"PYTHONPATH": "."},
        timeout=60,
    )
    assert (
        Tokenizer(output).fingerprint
        == Tokenizer(train_tokenizer(captions, 400)).fingerprint
    )


def test_ids_are_those_of_transformers(tmp_path, model, captions):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "spiece.model").write_bytes(model)
    # The constructor would ignore the file that it is given; `from_pretrained` reads.
    theirs = transformers.T5Tokenizer.from_pretrained(str(tmp_path), extra_ids=100)
    ours = Tokenizer(model, "unk")
    for text in WEIRD + captions:
        for length in (6, 64):
            expected = theirs(text, max_length=length, truncation=True)
            assert ours.encode(text, length) == expected["input_ids"], text
