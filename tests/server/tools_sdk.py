"""Tools, thinking and structured output, by both packages."""

import json

import anthropic
import openai

from anthropic_sdk import GREEDY, PERSON, PERSON_QUESTION
from openai_sdk import MODEL, client

WEATHER = {"name": "get_weather", "description": "Get the weather of a city.",
           "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
TOOLS = [{"type": "function", "function": WEATHER}]
QUESTION = [{"role": "user", "content": "What is the weather in Oslo?"}]
RESULT = '{"temperature": 7, "sky": "rainy"}'


def a_tool_loop(url, key):
    create = client(url, key).chat.completions.create
    first = create(model=MODEL, messages=QUESTION, tools=TOOLS, temperature=0)
    assert first.choices[0].finish_reason == "tool_calls", first
    call = first.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    messages = [*QUESTION, first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    second = create(model=MODEL, messages=messages, tools=TOOLS, temperature=0)
    assert second.choices[0].finish_reason == "stop"
    assert "rainy" in second.choices[0].message.content, second


def streamed_calls(url, key):
    with client(url, key).chat.completions.stream(model=MODEL, messages=QUESTION, tools=TOOLS, temperature=0) as events:
        call = events.get_final_completion().choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})


def choices_of_tools(url, key):
    create = client(url, key).chat.completions.create
    none = create(model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=60)
    assert not none.choices[0].message.tool_calls
    hello = [{"role": "user", "content": "Hello"}]
    forced = create(model=MODEL, messages=hello, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=200)
    assert forced.choices[0].message.tool_calls[0].function.name == "get_weather"


def calls_in_responses(url, key):
    tools = [{"type": "function", **WEATHER}]
    first = client(url, key).responses.create(model=MODEL, input=QUESTION, tools=tools, temperature=0)
    call = next(item for item in first.output if item.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Oslo"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    second = client(url, key).responses.create(model=MODEL, input=[*QUESTION, call, output], tools=tools, temperature=0)
    assert "rainy" in second.output_text
    with client(url, key).responses.stream(model=MODEL, input=QUESTION, tools=tools, temperature=0) as events:
        kinds = {event.type for event in events}
    assert "response.function_call_arguments.done" in kinds


def calls_in_messages(url, key):
    create = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=60).messages
    tools = [{"name": "get_weather", "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}]
    with create.stream(model=MODEL, max_tokens=100, messages=QUESTION, tools=tools, extra_body=GREEDY) as events:
        first = events.get_final_message()
    assert first.stop_reason == "tool_use"
    call = next(block for block in first.content if block.type == "tool_use")
    assert call.input == {"city": "Oslo"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": RESULT}
    messages = [*QUESTION, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = create.create(model=MODEL, max_tokens=60, messages=messages, tools=tools, extra_body=GREEDY)
    assert "rainy" in second.content[0].text


def thinking(url, key):
    create = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=60).messages.create
    question = [{"role": "user", "content": "What is 12 plus 30?"}]
    answer = create(model=MODEL, max_tokens=200, messages=question, thinking={"type": "enabled", "budget_tokens": 1024})
    assert answer.content[0].type == "thinking" and answer.content[0].thinking
    answer = client(url, key).chat.completions.create(model=MODEL, messages=question, reasoning_effort="low")
    assert answer.choices[0].message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


def structured_output(url, key):
    for seed in range(5):
        answer = client(url, key).chat.completions.create(
            model=MODEL, messages=PERSON_QUESTION, seed=seed, temperature=1, max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}})
        assert answer.choices[0].finish_reason == "stop", answer
        person = json.loads(answer.choices[0].message.content)
        assert set(person) == {"name", "age"} and isinstance(person["age"], int), person
    unsupported = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    try:
        client(url, key).chat.completions.create(model=MODEL, messages=PERSON_QUESTION, response_format=unsupported)
    except openai.BadRequestError:
        return
    raise AssertionError("an impossible schema was accepted")


TESTS = [a_tool_loop, streamed_calls, choices_of_tools, calls_in_responses, calls_in_messages, thinking, structured_output]
