"""The anthropic package."""

import asyncio
import json

import anthropic

MODEL = "tiny-chat"
# The package has no argument for it any more, the interface does.
GREEDY = {"temperature": 0}
QUESTION = [{"role": "user", "content": "What is 12 plus 30?"}]
# Of bounded length, so that every answer is whole.
PERSON = {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"], "additionalProperties": False}
PERSON_QUESTION = [{"role": "user", "content": "Tom is 7 years old. Give name and age as JSON."}]


def client(url, key):
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=60)


def message(url, key):
    answer = client(url, key).messages.create(model=MODEL, max_tokens=40, messages=QUESTION, extra_body=GREEDY)
    assert "42" in answer.content[0].text, answer
    assert (answer.stop_reason, answer.role) == ("end_turn", "assistant")
    cut = client(url, key).messages.create(model=MODEL, max_tokens=2, messages=QUESTION)
    assert cut.stop_reason == "max_tokens"


def stream(url, key):
    whole = client(url, key).messages.create(model=MODEL, max_tokens=40, messages=QUESTION, extra_body=GREEDY)
    with client(url, key).messages.stream(model=MODEL, max_tokens=40, messages=QUESTION, extra_body=GREEDY) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.cache_read_input_tokens > 0


def system_blocks_and_the_cache(url, key):
    def ask(number):
        # As coding agents send it: a block that changes, then the same long one.
        system = [{"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.{number}; cch={number};"},
                  {"type": "text", "text": "The code of the red box is 4821.\n" * 30, "cache_control": {"type": "ephemeral"}}]
        messages = [{"role": "user", "content": [{"type": "text", "text": "What is the code of the red box?"}]}]
        return client(url, key).messages.create(
            model="claude-sonnet-4-5", max_tokens=30, extra_body=GREEDY, system=system, messages=messages,
            metadata={"user_id": "somebody"})
    assert "4821" in ask(111).content[0].text
    assert ask(222).usage.input_tokens == 1


def counting(url, key):
    counted = client(url, key).messages.count_tokens(model=MODEL, messages=QUESTION, system="Be brief.")
    used = client(url, key).messages.create(model=MODEL, max_tokens=1, messages=QUESTION, system="Be brief.").usage
    assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens


def a_turn_with_results_of_tools(url, key):
    tools = [{"name": "get_weather", "description": "Get the weather of a city.",
              "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}]
    messages = [{"role": "user", "content": "What is the weather in Oslo?"},
                {"role": "assistant", "content": [
                    {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": '{"temperature": 7, "sky": "rainy"}'}]}]
    answer = client(url, key).messages.create(model=MODEL, max_tokens=60, extra_body=GREEDY, tools=tools, messages=messages)
    assert "rainy" in answer.content[0].text, answer


def errors(url, key):
    def raises(kind, word, call):
        try:
            call()
        except kind as error:
            assert word in str(error), error
            return error
        raise AssertionError(f"no {kind.__name__}")
    create = client(url, key).messages.create
    picture = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}]
    raises(anthropic.BadRequestError, "only text", lambda: create(
        model=MODEL, max_tokens=1, messages=[{"role": "user", "content": picture}]))
    long = [{"role": "user", "content": "word " * 20000}]
    raises(anthropic.BadRequestError, "tokens", lambda: create(model=MODEL, max_tokens=1, messages=long))
    error = raises(anthropic.AuthenticationError, "key", lambda: client(url, "wrong").models.list())
    assert error.request_id


def structured_output(url, key):
    output = {"type": "json_schema", "schema": PERSON}
    # As it is called, and as it was called first.
    for ways in [{"output_config": {"format": output}}, {"extra_body": {"output_format": output}}]:
        answer = client(url, key).messages.create(model=MODEL, max_tokens=200, messages=PERSON_QUESTION, **ways)
        assert answer.stop_reason == "end_turn", answer
        person = json.loads(answer.content[0].text)
        assert set(person) == {"name", "age"} and 0 <= person["age"] <= 150, person
    impossible = {"format": {"type": "json_schema", "schema": {"type": "no such type"}}}
    try:
        client(url, key).messages.create(model=MODEL, max_tokens=20, messages=PERSON_QUESTION, output_config=impossible)
    except anthropic.BadRequestError:
        return
    raise AssertionError("an impossible schema was accepted")


def cancel(url, key):
    story = [{"role": "user", "content": "Tell me a long story."}]
    events = client(url, key).messages.create(model=MODEL, max_tokens=6000, messages=story, stream=True)
    kinds = [event.type for _, event in zip(range(5), events)]
    assert kinds[0] == "message_start" and kinds[-1] == "content_block_delta", kinds
    events.close()
    message(url, key)


def concurrency(url, key):
    async def all_of_them():
        async with anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0, timeout=120) as client:
            async def one(index):
                messages = [{"role": "user", "content": f"What is {index} plus 30?"}]
                async with client.messages.stream(
                        model=MODEL, max_tokens=40, messages=messages, extra_body=GREEDY) as events:
                    return await events.get_final_text()
            return await asyncio.gather(*[one(index) for index in range(24)])
    texts = asyncio.run(all_of_them())
    right = sum(str(index + 30) in text for index, text in enumerate(texts))
    assert right >= 20, texts


def models(url, key):
    assert MODEL in [model.id for model in client(url, key).models.list()]


TESTS = [message, stream, system_blocks_and_the_cache, counting, a_turn_with_results_of_tools, structured_output, errors,
         models, cancel, concurrency]
