"""Prompts and label masks: what is predicted, what never is, and what is left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedmezo.data import Record, Row, encode
from fedmezo.errors import DataError

CORPUS = [
    "You are given an instruction and an input that goes with it. Write a response that carries it out.",
    "### Instruction:\nName a colour.\n\n### Input:\nthe sky\n\n### Response:blue",
    "this film is fun It was great",
    "this film is dull It was terrible",
    "yes no yes no aaaa aaaa aaaa bbbb ccccc",
] * 4
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_tokenizer(*, bos=False, chat=None, eos="</s>", vocabulary=400):
    """A byte-level BPE tokenizer without a padding token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["</s>", "<bos>", "<s>", "<e>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    if bos:
        # As some tokenizers do, it also ends every text; that mark must not come between prompt and answer.
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A </s>", special_tokens=[("<bos>", 1), ("</s>", 0)]
        )
    extra = ["<s>", "<e>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, chat_template=chat, additional_special_tokens=extra
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def word_tokenizer():
    words = ["[UNK]", "</s>", "say", "one", "two", "three", "It", "was", "great", "terrible", "fine"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="[UNK]")


def texts(tokenizer, row):
    return tokenizer.decode(row.ids[: row.start]), tokenizer.decode(row.ids[row.start :])


# The golden row: ids by hand from the eleven words above.
def test_golden_masking():
    encoded = encode(
        [Record("say one", "two", "three one")], word_tokenizer(), template="{instruction} {input} ", max_tokens=99
    )
    (example,) = encoded.examples
    assert example.rows == (Row((2, 3, 4, 5, 3, 1), 3),)
    assert (example.answer, example.options, encoded.dropped, dict(encoded.reasons)) == (0, (), 0, {})


def test_tokenizer_has_no_padding_token(tokenizer):
    assert tokenizer.pad_token_id is None


def test_alpaca_has_two_forms(tokenizer):
    records = [Record("Name a colour.", "the sky", "blue"), Record("Name a colour.", "", "red")]
    first, second = (e.rows[0] for e in encode(records, tokenizer, template="alpaca", max_tokens=999).examples)
    assert texts(tokenizer, first) == (
        "You are given an instruction and an input that goes with it. Write a response that carries out the "
        "instruction.\n\n### Instruction:\nName a colour.\n\n### Input:\nthe sky\n\n### Response:",
        "blue</s>",
    )
    assert texts(tokenizer, second) == (
        "You are given an instruction. Write a response that carries it out.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:",
        "red</s>",
    )


def test_alpaca_input_gives_every_record_the_form_with_an_input(tokenizer):
    records = [Record("Name a colour.", "the sky", "blue"), Record("Name a colour.", "", "red"), Record("", "x", "y")]
    rows = [e.rows[0] for e in encode(records, tokenizer, template="alpaca-input", max_tokens=999).examples]
    intro = "You are given an instruction and an input that goes with it. Write a response that carries out the "
    for record, row in zip(records, rows, strict=True):
        assert texts(tokenizer, row) == (
            f"{intro}instruction.\n\n### Instruction:\n{record.instruction}\n\n### Input:\n{record.input}\n\n"
            "### Response:",
            f"{record.output}</s>",
        )


@pytest.mark.parametrize(("objective", "rows"), [("answer", 1), ("choices", 2)])
def test_the_prompt_of_an_example_is_what_all_its_rows_begin_with(tokenizer, objective, rows):
    record = Record("Say.", "it", "two words", choices=("two words", "three small words"))
    (example,) = encode([record], tokenizer, template="plain", max_tokens=999, objective=objective).examples
    assert len(example.rows) == rows
    assert tokenizer.decode(example.prompt) == "Say.\nit"
    assert all(row.ids[: row.start] == example.prompt for row in example.rows)


@pytest.mark.parametrize("template", ["alpaca", "alpaca-input", "plain", "sst2", "{instruction}|{input}|"])
@given(
    instruction=st.text(min_size=1, max_size=20), given=st.text(max_size=20), output=st.text(min_size=1, max_size=20)
)
def test_prompt_alone_is_masked_and_nothing_is_lost(template, instruction, given, output):
    tokenizer = SHARED
    record = Record(instruction, given, output)
    encoded = encode([record], tokenizer, template=template, max_tokens=9999)
    if not output.strip():
        assert encoded.reasons == {"empty answer": 1}
        return
    if template == "plain" and not instruction.strip() and not given.strip(" "):
        assert encoded.reasons == {"empty prompt": 1}
        return
    (row,) = encoded.examples[0].rows
    prompt = tokenizer.decode(row.ids[: row.start])
    assert list(row.ids[: row.start]) == tokenizer([prompt], add_special_tokens=False)["input_ids"][0]
    tail = tokenizer.decode(row.ids[row.start :])
    assert tail.removesuffix("</s>").lstrip(" ") == output.lstrip(" ")
    assert tail.endswith("</s>") == (template != "sst2")


SHARED = byte_tokenizer()


def test_merge_across_the_border_is_undone(tokenizer):
    (example,) = encode([Record("ccc", "", "cc")], tokenizer, template="{instruction}", max_tokens=99).examples
    joint, prompt, answer = tokenizer(["ccccc", "ccc", "cc"], add_special_tokens=False)["input_ids"]
    assert joint[: len(prompt)] != prompt
    assert list(example.rows[0].ids) == [*prompt, *answer, tokenizer.eos_token_id]
    assert example.rows[0].start == len(prompt)


def test_space_before_the_answer_belongs_to_the_answer(tokenizer):
    (example,) = encode([Record("is fun", "", "great")], tokenizer, template="plain", max_tokens=99).examples
    assert texts(tokenizer, example.rows[0]) == ("is fun", " great</s>")


def test_opening_token_is_kept_and_a_closing_one_does_not_part_prompt_from_answer():
    tokenizer = byte_tokenizer(bos=True)
    (example,) = encode([Record("aaaa", "", "bbbb")], tokenizer, template="{instruction}:", max_tokens=99).examples
    (row,) = example.rows
    assert row.ids[0] == 1
    assert list(row.ids).count(0) == 1
    assert row.ids[-1] == 0
    assert texts(tokenizer, row) == ("<bos>aaaa:", "bbbb</s>")


def test_tokenizer_without_end_token_ends_with_the_answer():
    tokenizer = byte_tokenizer(eos=None)
    (example,) = encode([Record("aaaa", "", "bbbb")], tokenizer, template="plain", max_tokens=99).examples
    assert texts(tokenizer, example.rows[0])[1] == " bbbb"


def test_chat_ends_with_the_template_s_own_mark():
    tokenizer = byte_tokenizer(chat=CHAT)
    for template in ("chat", "auto"):
        (example,) = encode([Record("Do", "this", "done")], tokenizer, template=template, max_tokens=99).examples
        assert texts(tokenizer, example.rows[0]) == ("<s>user\nDo\n\nthis<e>\n<s>assistant\n", "done<e>")


def test_chat_without_a_mark_ends_with_the_end_token():
    tokenizer = byte_tokenizer(chat="{% for m in messages %}- {{ m['content'] }}\n{% endfor %}")
    (example,) = encode([Record("Do", "", "done")], tokenizer, template="chat", max_tokens=99).examples
    assert texts(tokenizer, example.rows[0])[1] == "done</s>"


def test_chat_space_before_the_answer_is_the_template_s():
    chat = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>{{ m['content'] }}<e>{% else %} {{ m['content'] }}</s>"
    )
    tokenizer = byte_tokenizer(chat=chat + "{% endif %}{% endfor %}")
    (example,) = encode([Record("Do", "", "done")], tokenizer, template="chat", max_tokens=99).examples
    assert texts(tokenizer, example.rows[0]) == ("<s>Do<e>", " done</s>")


def test_auto_is_alpaca_without_a_chat_template(tokenizer):
    records = [Record("Do", "", "done")]
    assert encode(records, tokenizer, template="auto", max_tokens=999) == encode(
        records, tokenizer, template="alpaca", max_tokens=999
    )


def test_record_with_only_an_input_has_it_as_its_instruction(tokenizer):
    one, other = (
        encode([record], tokenizer, template="alpaca", max_tokens=999).examples[0].rows
        for record in (Record("", "Do", "done"), Record("Do", "", "done"))
    )
    assert one == other


def test_braces_in_a_record_stay(tokenizer):
    record = Record("f {input} {x}", "y", "z")
    (example,) = encode([record], tokenizer, template="{instruction}/{input}:", max_tokens=99).examples
    assert texts(tokenizer, example.rows[0])[0] == "f {input} {x}/y:"
    (example,) = encode([record], tokenizer, template="alpaca", max_tokens=999).examples
    assert "f {input} {x}" in texts(tokenizer, example.rows[0])[0]


@given(limit=st.integers(2, 60))
def test_rows_fit_and_every_record_is_an_example_or_counted(limit):
    records = [Record("a" * n, "b" * n, "c " * n) for n in range(1, 12)] + [Record("x", "y", "  ")]
    full = encode(records, SHARED, template="plain", max_tokens=9999).examples
    encoded = encode(records, SHARED, template="plain", max_tokens=limit)
    assert len(encoded.examples) + encoded.dropped == len(records)
    assert sum(encoded.reasons.values()) == encoded.dropped
    whole = {example.record: example.rows[0] for example in full}
    for example in encoded.examples:
        (row,) = example.rows
        assert len(row.ids) <= limit
        assert row.ids == whole[example.record].ids[: len(row.ids)]
        assert row.start == whole[example.record].start
    for record in set(whole) - {example.record for example in encoded.examples}:
        assert whole[record].start >= limit


def test_reasons_are_counted(tokenizer):
    records = [Record("a" * 90, "", "b"), Record("a", "", " "), Record("a", "", ""), Record("a", "", "b")]
    encoded = encode(records, tokenizer, template="plain", max_tokens=8)
    assert encoded.reasons == {"prompt longer than max_tokens": 1, "empty answer": 2}
    assert [example.record for example in encoded.examples] == [3]


def test_empty_prompt_is_counted(tokenizer):
    encoded = encode([Record("", "", "b")], tokenizer, template="{instruction}", max_tokens=8)
    assert encoded.reasons == {"empty prompt": 1}


def test_one_token_choices_share_one_row():
    tokenizer = word_tokenizer()
    record = Record("?", "fine", "great", category="film", choices=("terrible", "great"))
    (example,) = encode([record], tokenizer, template="sst2", max_tokens=9, objective="choices").examples
    assert example.rows == (Row((10, 6, 7, 8), 3),)
    assert example.options == (9, 8)
    assert (example.answer, example.category) == (1, "film")


def test_longer_choices_have_a_row_each():
    record = Record("say", "", "two three", choices=("one", "two three"))
    (example,) = encode([record], word_tokenizer(), template="plain", max_tokens=9, objective="choices").examples
    assert example.rows == (Row((2, 3), 1), Row((2, 4, 5), 1))
    assert (example.answer, example.options) == (1, ())


def test_choices_carry_a_leading_space_and_no_end_token(tokenizer):
    record = Record("is it", "", "great", choices=("great", "a very terrible film"))
    (example,) = encode([record], tokenizer, template="{instruction}?", max_tokens=99, objective="choices").examples
    assert [texts(tokenizer, row) for row in example.rows] == [
        ("is it?", " great"),
        ("is it?", " a very terrible film"),
    ]
    (example,) = encode([record], tokenizer, template="{instruction}\n", max_tokens=99, objective="choices").examples
    assert texts(tokenizer, example.rows[0]) == ("is it\n", "great")


def test_choices_come_from_the_category_s_outputs():
    records = [Record("say", "", word, category="count") for word in ("two", "one", "two")]
    encoded = encode(records, word_tokenizer(), template="plain", max_tokens=9, objective="choices")
    assert [example.options for example in encoded.examples] == [(3, 4)] * 3
    assert [example.answer for example in encoded.examples] == [1, 0, 1]


def test_record_whose_choices_do_not_all_fit_is_counted():
    record = Record("say", "", "one two", choices=("one two", "one two three"))
    encoded = encode([record], word_tokenizer(), template="plain", max_tokens=3, objective="choices")
    assert encoded.reasons == {"prompt and choices longer than max_tokens": 1}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (Record("say", "", "two", choices=("one", "three")), "Record 0: the answer 'two' is not one of its choices"),
        (Record("say", "", "two", choices=("two", "two")), "expected two or more different choices"),
        (Record("say", "", "two", choices=("two",)), "expected two or more different choices"),
        (Record("say", "", "two", category="c"), "category 'c' name no choices and have 1 distinct outputs"),
        (Record("say", "", "cat", choices=("cat", "dog")), "cannot tell the choices"),
    ],
)
def test_unusable_choices_are_refused(record, sentence):
    with pytest.raises(DataError, match=sentence):
        encode([record], word_tokenizer(), template="plain", max_tokens=9, objective="choices")


def test_too_many_outputs_are_no_choices(tokenizer):
    records = [Record("say", "", str(n)) for n in range(21)]
    with pytest.raises(DataError, match="have 21 distinct outputs; expected 2 to 20"):
        encode(records, tokenizer, template="plain", max_tokens=99, objective="choices")
    assert len(encode(records[:20], tokenizer, template="plain", max_tokens=99, objective="choices").examples) == 20


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"template": "alpacca"}, "Unknown template 'alpacca'.*did you mean 'alpaca'"),
        ({"template": "chat"}, "has no chat template"),
        ({"template": "{instruction}:"}, "lose the input of 1 of 1 records; add {input}"),
        ({"template": "{instruction}{input}{output}"}, "take {output} out"),
        ({"template": "plain", "max_tokens": 1}, "max_tokens: expected at least 2.*got 1"),
        ({"template": "plain", "objective": "guess"}, "Unknown objective 'guess'; expected one of answer, choices"),
    ],
)
def test_unusable_settings_are_refused(tokenizer, options, sentence):
    with pytest.raises(DataError, match=sentence):
        encode([Record("a", "b", "c")], tokenizer, **{"max_tokens": 9, **options})


def test_failing_chat_template_is_refused():
    tokenizer = byte_tokenizer(chat="{{ raise_exception('only tools') }}")
    with pytest.raises(DataError, match="only tools"):
        encode([Record("a", "", "c")], tokenizer, template="chat", max_tokens=9)


@pytest.mark.parametrize("start", [0, 2, 3])
def test_row_needs_a_prompt_and_a_label(start):
    with pytest.raises(DataError, match="Row: expected"):
        Row((1, 2), start)
