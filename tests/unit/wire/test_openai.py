"""OpenAI's requests: every field checked, what they need, and a bound on their tokens that holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ondol.core.catalog import Limits
from ondol.core.inference import Capability, InferenceRequest, Task
from ondol.errors import InvalidRequest, TooLarge
from ondol.wire.openai import IMAGE_TOKENS_MAX, MESSAGE_TOKENS, parse_request
from ondol.wire.openai_replies import NOT_SERVED, SERVED, RouteModel, error_body, models_body

LIMITS = Limits(messages=8, content_parts=8, embedding_inputs=8)
C = Capability
HELLO = [{"role": "user", "content": "hello"}]


def parse(task: Task = Task.CHAT, /, **fields: Any) -> InferenceRequest:
    body = {"model": "r"} | fields
    if task is Task.CHAT:
        body.setdefault("messages", HELLO)
    body.setdefault("prompt" if task is Task.COMPLETION else "input", "hello")
    return parse_request(task, json.dumps(body).encode(), LIMITS)


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_a_plain_request_needs_nothing() -> None:
    found = parse_request(Task.CHAT, json.dumps({"model": "r", "messages": HELLO}).encode(), LIMITS)
    assert found == InferenceRequest(
        task=Task.CHAT, route="r", body={"model": "r", "messages": HELLO}, prompt_tokens=5,
        prompt_tokens_max=5 + MESSAGE_TOKENS,
    )  # fmt: skip


def test_unknown_fields_stay_in_the_body() -> None:
    assert parse(new_field={"a": [1, None]}).body["new_field"] == {"a": [1, None]}


def test_what_the_gateway_reads_is_taken_over() -> None:
    found = parse(
        stream=True, stream_options={"include_usage": True}, n=3, max_tokens=7, user="u",
        metadata={"b": "2", "a": "1"},
    )  # fmt: skip
    assert (found.stream, found.include_usage, found.n, found.max_output_tokens) == (True, True, 3, 7)
    assert (found.user, found.tags) == ("u", (("b", "2"), ("a", "1")))
    assert parse(max_tokens=7, max_completion_tokens=5).max_output_tokens == 5
    assert parse(max_tokens=0).max_output_tokens is None
    assert parse(stream=True, stream_options={}).include_usage is False


def test_null_is_the_same_as_absent() -> None:
    names = (
        "n",
        "stream",
        "stream_options",
        "max_tokens",
        "metadata",
        "user",
        "tools",
        "response_format",
        "stop",
    )
    found = parse(**dict.fromkeys(names))
    assert (found.n, found.stream, found.tags, found.needs) == (1, False, (), frozenset())


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, {C.TOOLS}),
        ({"tools": []}, set()),
        ({"functions": [{"name": "f"}]}, {C.TOOLS}),
        ({"tool_choice": "auto"}, set()),
        ({"tool_choice": "required"}, {C.TOOL_CHOICE}),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, {C.TOOL_CHOICE}),
        ({"response_format": {"type": "text"}}, set()),
        ({"response_format": {"type": "json_object"}}, {C.JSON_OBJECT}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}},
            {C.JSON_SCHEMA},
        ),
        ({"logit_bias": {"5": -100}}, {C.LOGIT_BIAS}),
        ({"logit_bias": {}}, set()),
        ({"seed": 0}, {C.SEED}),
        ({"reasoning_effort": "low"}, {C.REASONING_EFFORT}),
        ({"prediction": {"type": "content", "content": "x"}}, {C.PREDICTION}),
        ({"web_search_options": {"search_context_size": "low"}}, {C.WEB_SEARCH}),
        ({"audio": {"voice": "v"}}, {C.AUDIO_OUT}),
        ({"logprobs": True}, {C.LOGPROBS}),
        ({"logprobs": False}, set()),
        ({"n": 1}, set()),
        ({"n": 2}, {C.CHOICES}),
        (
            {"messages": user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}})},
            {C.IMAGE},
        ),
        ({"messages": user({"type": "input_audio", "input_audio": {"data": "AA"}})}, {C.AUDIO}),
        ({"messages": user({"type": "file", "file": {"file_id": "f"}})}, {C.FILE}),
        ({"messages": user({"type": "text", "text": "x"})}, set()),
    ],
)
def test_what_a_chat_needs(fields: dict[str, Any], needs: set[Capability]) -> None:
    assert parse(**fields).needs == needs


@pytest.mark.parametrize(
    ("task", "fields", "needs"),
    [
        (Task.COMPLETION, {"logprobs": 5}, {C.LOGPROBS}),
        (Task.COMPLETION, {"echo": True}, {C.ECHO}),
        (Task.COMPLETION, {"echo": False}, set()),
        (Task.COMPLETION, {"suffix": "x"}, {C.SUFFIX}),
        (Task.COMPLETION, {"best_of": 2}, {C.CHOICES}),
        (Task.EMBEDDING, {"dimensions": 256}, {C.DIMENSIONS}),
        (Task.EMBEDDING, {"encoding_format": "base64"}, set()),
    ],
)
def test_what_the_others_need(task: Task, fields: dict[str, Any], needs: set[Capability]) -> None:
    assert parse(task, **fields).needs == needs


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[1", b'{"model": "\xff"}', b"nul", b'{"a": 1e999}', b"[" * 100_000]
)
def test_what_is_not_json(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        parse_request(Task.CHAT, raw, LIMITS)


@pytest.mark.parametrize(
    ("raw", "found"), [(b"[]", "list"), (b"null", "NoneType"), (b'"x"', "str"), (b"1", "int")]
)
def test_a_body_that_is_no_object(raw: bytes, found: str) -> None:
    with pytest.raises(InvalidRequest, match=f"the body is {found}, expected a JSON object"):
        parse_request(Task.CHAT, raw, LIMITS)


CHAT_WRONG: list[tuple[str, Any]] = [
    ("model", None), ("model", ""), ("model", 5), ("temperature", 2.1), ("temperature", "1"),
    ("temperature", True), ("top_p", -0.1), ("n", 0), ("n", 129), ("n", 1.0), ("n", True), ("stream", 1),
    ("stream", "true"), ("stream_options", []), ("stream_options", {"include_usage": 1}), ("stop", 5),
    ("stop", ["a"] * 5), ("stop", ["a", 1]), ("max_tokens", -1), ("max_tokens", "7"),
    ("max_completion_tokens", 10**8), ("seed", 2**63), ("presence_penalty", -3), ("frequency_penalty", 3),
    ("logit_bias", []), ("logit_bias", {"1": "x"}), ("user", 5), ("metadata", []),
    ("metadata", {str(i): "x" for i in range(17)}), ("logprobs", 3), ("top_logprobs", 21), ("tools", {}),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 129), ("tool_choice", "any"),
    ("tool_choice", 1), ("parallel_tool_calls", "yes"), ("response_format", "json"),
    ("response_format", {"type": "xml"}), ("reasoning_effort", "huge"), ("functions", {}), ("store", 0),
    ("best_of", "x"), ("messages", None), ("messages", []), ("messages", "hello"),
]  # fmt: skip
OTHERS_WRONG: list[tuple[Task, str, Any]] = [
    (Task.COMPLETION, "prompt", None), (Task.COMPLETION, "prompt", ""), (Task.COMPLETION, "prompt", []),
    (Task.COMPLETION, "prompt", {"a": 1}), (Task.COMPLETION, "prompt", ["a", 1]),
    (Task.COMPLETION, "prompt", [1, -1]), (Task.COMPLETION, "prompt", [True]),
    (Task.COMPLETION, "prompt", [["a"]]), (Task.COMPLETION, "logprobs", True), (Task.COMPLETION, "echo", 1),
    (Task.COMPLETION, "best_of", 21), (Task.COMPLETION, "suffix", 1),
    (Task.COMPLETION, "response_format", "json"), (Task.COMPLETION, "max_completion_tokens", "7"),
    (Task.EMBEDDING, "input", None), (Task.EMBEDDING, "input", [[1], "a"]),
    (Task.EMBEDDING, "encoding_format", "hex"), (Task.EMBEDDING, "dimensions", 0),
    (Task.EMBEDDING, "n", "2"), (Task.EMBEDDING, "stream", True), (Task.EMBEDDING, "stream_options", 5),
    (Task.EMBEDDING, "max_tokens", "x"), (Task.EMBEDDING, "response_format", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "field", "value"), [(Task.CHAT, *pair) for pair in CHAT_WRONG] + OTHERS_WRONG
)
def test_a_wrong_field_is_named_with_what_was_found_and_expected(task: Task, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"'{field}.*': found .+, expected ") as caught:
        parse(task, **{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}, {"x": 1}]}, "tools[1]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}, "response_format.json_schema"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {"k" * 65: "x"}}, "metadata." + "k" * 64),
        ({"messages": [*HELLO, "x"]}, "messages[1]"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "u" * 10, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": user({"type": "video"})}, "messages[0].content[0]"),
        ({"messages": user({"type": "text", "text": 1})}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": user({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}})}, "messages[0].content[0].image_url.url"),
        ({"messages": user({"type": "input_audio", "input_audio": {}})}, "messages[0].content[0].input_audio.data"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)  # fmt: skip
def test_the_place_of_a_wrong_value_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("task", "field", "values"),
    [
        (Task.CHAT, "temperature", (0, 2, 2.0)), (Task.CHAT, "top_p", (0, 1)), (Task.CHAT, "n", (1, 128)),
        (Task.CHAT, "stop", ("", [], ["a"] * 4)), (Task.CHAT, "max_tokens", (0, 10_000_000)),
        (Task.CHAT, "seed", (-(2**63), 2**63 - 1)), (Task.CHAT, "presence_penalty", (-2, 2)),
        (Task.CHAT, "top_logprobs", (0, 20)), (Task.CHAT, "best_of", (1, 20)),
        (Task.CHAT, "tools", ([{"type": "function", "function": {"name": "f"}}] * 128,)),
        (Task.CHAT, "metadata", ({"k" * 64: "x" * 512}, {str(i): "" for i in range(16)})),
        (Task.COMPLETION, "logprobs", (0, 5)), (Task.EMBEDDING, "dimensions", (1, 65_536)),
        (Task.EMBEDDING, "stream", (False,)),
    ],
)  # fmt: skip
def test_the_ends_of_a_range_belong_to_it(task: Task, field: str, values: tuple[Any, ...]) -> None:
    for value in values:
        assert parse(task, **{field: value}).body[field] == value


def test_the_guess_is_a_token_for_four_bytes_and_some_for_the_form() -> None:
    text = "x" * 40
    chat = parse(messages=[{"role": "user", "content": text}] * 2)
    assert chat.prompt_tokens == 80 // 4 + 2 * 4
    assert parse(Task.COMPLETION, prompt=[text, text], suffix=text).prompt_tokens == 120 // 4 + 2 * 4
    assert parse(Task.EMBEDDING, input=[text, text, text]).prompt_tokens == 120 // 4 + 3 * 2


def test_what_a_client_wrote_is_not_in_the_message() -> None:
    for fields in ({"messages": "my secret"}, {"tool_choice": "my secret"}, {"user": ["my secret"]}):
        with pytest.raises(InvalidRequest) as caught:
            parse(**fields)
        assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("task", "fields", "param"),
    [
        (Task.CHAT, {"messages": HELLO * 9}, "messages"),
        (Task.CHAT, {"messages": user(*[{"type": "text", "text": "x"}] * 5) * 2}, "messages"),
        (Task.COMPLETION, {"prompt": ["x"] * 9}, "prompt"),
        (Task.EMBEDDING, {"input": [[1]] * 9}, "input"),
    ],
)
def test_more_than_the_limits_allow_is_too_large(task: Task, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(TooLarge, match="8") as caught:
        parse(task, **fields)
    assert caught.value.param == param


def test_one_long_list_of_token_ids_is_one_input() -> None:
    found = parse(Task.EMBEDDING, input=list(range(100)))
    assert found.prompt_tokens_max == 100 + MESSAGE_TOKENS


TEXT = st.text(max_size=30)
CALLS = st.fixed_dictionaries(
    {"id": TEXT, "function": st.fixed_dictionaries({"name": TEXT, "arguments": TEXT})}
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"])},
        optional={
            "content": TEXT
            | st.none()
            | st.lists(TEXT.map(lambda text: {"type": "text", "text": text}), max_size=2),
            "tool_calls": st.lists(CALLS, max_size=2),
            "name": TEXT,
            "refusal": TEXT,
            "tool_call_id": TEXT,
        },
    ),
    min_size=1,
    max_size=4,
)


def texts_of(value: Any) -> list[str]:
    """Every text in it that a caller chose."""
    if isinstance(value, str):
        return [value]
    items = (
        value
        if isinstance(value, list)
        else [v for k, v in value.items() if k not in ("type", "role")]
        if value
        else []
    )
    return [text for item in items for text in texts_of(item)]


def size_of(value: Any) -> int:
    return sum(len(text.encode()) for text in texts_of(value))


@given(MESSAGES)
def test_the_bound_on_a_chats_tokens_covers_every_byte(messages: list[dict[str, Any]]) -> None:
    found = parse(messages=messages)
    assert found.prompt_tokens_max >= size_of(messages) + MESSAGE_TOKENS * len(messages)
    assert found.prompt_tokens <= found.prompt_tokens_max


@given(TEXT, TEXT)
def test_the_bound_covers_tools_schemas_and_files(name: str, text: str) -> None:
    tools = [{"type": "function", "function": {"name": name, "description": text}}]
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": {"title": text}}}
    file = {"type": "file", "file": {"file_data": text, "filename": name}}
    found = parse(tools=tools, response_format=form, messages=user(file))
    assert found.prompt_tokens_max >= size_of([tools, form, file["file"]])


@given(st.lists(TEXT, min_size=1, max_size=8), TEXT)
def test_the_bound_covers_prompts_suffixes_and_inputs(texts: list[str], suffix: str) -> None:
    completion = parse(Task.COMPLETION, prompt=texts, suffix=suffix)
    assert completion.prompt_tokens_max >= size_of([*texts, suffix])
    assert parse(Task.EMBEDDING, input=texts).prompt_tokens_max >= size_of(texts)


def test_a_picture_has_an_allowance_each() -> None:
    picture = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    assert parse(messages=user(picture, picture)).prompt_tokens_max == 2 * IMAGE_TOKENS_MAX + MESSAGE_TOKENS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["type", "role", "content", "text", "x"]) | TEXT, inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
FIELDS = (
    "messages", "prompt", "input", "temperature", "n", "best_of", "stream", "stream_options", "stop",
    "max_tokens", "max_completion_tokens", "seed", "logit_bias", "user", "metadata", "logprobs", "tools",
    "tool_choice", "functions", "response_format", "reasoning_effort", "suffix", "echo", "dimensions",
)  # fmt: skip
KINDS = {
    "text": TEXT.map(lambda t: {"type": "text", "text": t}), "any": JSON,
    "image": JSON.map(lambda v: {"type": "image_url", "image_url": {"url": v}}),
    "audio": JSON.map(lambda v: {"type": "input_audio", "input_audio": {"data": v}}),
    "file": JSON.map(lambda v: {"type": "file", "file": {"file_data": v}}),
}  # fmt: skip
PARTS = st.one_of(*KINDS.values())
NEARLY = st.fixed_dictionaries(
    {
        "model": st.just("r"),
        "messages": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(PARTS, max_size=3) | JSON}), max_size=3),
        "prompt": st.just("p") | JSON,
        "input": st.just("i") | JSON,
    },
    optional={field: JSON for field in FIELDS if field not in ("messages", "prompt", "input")},
)  # fmt: skip


@settings(max_examples=300)
@given(st.sampled_from(list(Task)), NEARLY | JSON)
def test_any_json_gives_a_request_or_says_what_is_wrong(task: Task, body: Any) -> None:
    try:
        found = parse_request(task, json.dumps(body).encode(), LIMITS)
    except (InvalidRequest, TooLarge) as error:
        assert len(error.message) < 500
    else:
        assert 0 <= found.prompt_tokens <= found.prompt_tokens_max
        assert 1 <= found.n <= 128
        assert found.max_output_tokens is None or found.max_output_tokens > 0
        assert not (found.include_usage and not found.stream)


@given(st.sampled_from(list(Task)), st.binary(max_size=200))
def test_any_bytes_never_break_it(task: Task, raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_request(task, raw, LIMITS)


def test_errors_and_models_have_openais_shape() -> None:
    assert json.loads(error_body(message="m", kind="k", code="c")) == {
        "error": {"message": "m", "type": "k", "param": None, "code": "c"}
    }
    assert json.loads(models_body([RouteModel("r", 5, "ondol")])) == {
        "object": "list", "data": [{"id": "r", "created": 5, "owned_by": "ondol", "object": "model"}],
    }  # fmt: skip
    assert not {path.split("/")[2] for path in SERVED} & set(NOT_SERVED)


@pytest.mark.parametrize(
    ("task", "fields", "choices", "answers"),
    [
        (Task.CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 3}, 3, 3),
        (Task.COMPLETION, {"prompt": ["a", "b"], "n": 2}, 2, 4),
        (Task.COMPLETION, {"prompt": "a", "n": 2, "best_of": 5}, 5, 5),
        (Task.EMBEDDING, {"input": ["a", "b", "c"]}, 1, 0),
    ],
)
def test_all_that_can_be_written_is_counted(
    task: Task, fields: dict[str, Any], choices: int, answers: int
) -> None:
    request = parse_request(task, json.dumps({"model": "m"} | fields).encode(), Limits())
    assert (request.choices, request.answers) == (choices, answers)


def test_a_prediction_is_bounded_as_output() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "prediction": {"type": "content", "content": "x" * 99},
    }
    assert parse_request(Task.CHAT, json.dumps(body).encode(), Limits()).predicted_tokens_max >= 99
