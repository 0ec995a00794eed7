"""The openai package."""

import asyncio

import openai

MODEL = "tiny-chat"
QUESTION = [{"role": "user", "content": "What is 12 plus 30?"}]


def client(url, key):
    return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=60)


def chat(url, encoders, key):
    answer = client(url, key).chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert "42" in answer.choices[0].message.content, answer
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def stream(url, encoders, key):
    whole = client(url, key).chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    chunks = list(client(url, key).chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 4, "it came at once"
    usage = chunks[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def stream_helper(url, encoders, key):
    with client(url, key).chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0) as events:
        assert "42" in events.get_final_completion().choices[0].message.content


def options(url, encoders, key):
    create = client(url, key).chat.completions.create
    story = [{"role": "user", "content": "Tell me a short story about a fox."}]
    answer = create(model=MODEL, messages=story, n=2, seed=3, temperature=1, max_completion_tokens=12)
    again = create(model=MODEL, messages=story, n=2, seed=3, temperature=1, max_completion_tokens=12)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] != texts[1]
    told = create(model=MODEL, messages=story, logprobs=True, top_logprobs=2, max_tokens=3)
    tokens = told.choices[0].logprobs.content
    assert len(tokens) == 3 and all(len(token.top_logprobs) == 2 for token in tokens)
    stopped = create(model=MODEL, messages=story, temperature=0, stop=["fox"])
    assert "fox" not in stopped.choices[0].message.content


def a_conversation(url, encoders, key):
    messages, cached = [{"role": "system", "content": "The code of the red box is 4821.\n" * 20}], []
    for _ in range(10):
        messages.append({"role": "user", "content": "What is the code of the red box?"})
        answer = client(url, key).chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=30)
        assert "4821" in answer.choices[0].message.content, answer
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        usage = answer.usage
        cached.append((usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens))
    # All of the turn before comes from the cache.
    for (_, before), (found, _) in zip(cached, cached[1:]):
        assert found >= before, cached


def completions(url, encoders, key):
    answer = client(url, key).completions.create(model=MODEL, prompt=["Once upon a time", "The"], max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1]
    chunks = list(client(url, key).completions.create(model=MODEL, prompt="Once", max_tokens=5, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"


def responses(url, encoders, key):
    answer = client(url, key).responses.create(model=MODEL, input="What is 12 plus 30?", temperature=0, store=False)
    assert "42" in answer.output_text, answer
    assert answer.status == "completed"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    with client(url, key).responses.stream(model=MODEL, input="What is 12 plus 30?", temperature=0) as events:
        kinds = [event.type for event in events]
        assert events.get_final_response().output_text == answer.output_text
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    turns = [{"role": "user", "content": "What is 12 plus 30?"}, *answer.output, {"role": "user", "content": "Hello"}]
    assert client(url, key).responses.create(model=MODEL, input=turns).output_text


def embeddings(url, encoders, key):
    vectors = client(encoders, key).embeddings.create(model="bert", input=["ab", "b a"])
    assert len(vectors.data) == 2 and len(vectors.data[0].embedding) == len(vectors.data[1].embedding) > 1
    # The package asks for base64 unless told otherwise.
    numbers = client(encoders, key).embeddings.create(model="bert", input=["ab"], encoding_format="float")
    pairs = zip(numbers.data[0].embedding, vectors.data[0].embedding)
    assert max(abs(one - other) for one, other in pairs) < 1e-5


def models(url, encoders, key):
    assert MODEL in [model.id for model in client(url, key).models.list()]
    assert client(url, key).models.retrieve(MODEL).id == MODEL
    # A name that is not known is the default model, and the answer says so.
    assert client(url, key).chat.completions.create(model="gpt-4o", messages=QUESTION, max_tokens=2).model == MODEL


def raises(kind, word, call):
    try:
        call()
    except kind as error:
        assert word in str(error), error
        return error
    raise AssertionError(f"no {kind.__name__}")


def errors(url, encoders, key):
    create = client(url, key).chat.completions.create
    raises(openai.BadRequestError, "temperature", lambda: create(model=MODEL, messages=QUESTION, temperature=-3))
    long = [{"role": "user", "content": "word " * 20000}]
    error = raises(openai.BadRequestError, "tokens", lambda: create(model=MODEL, messages=long, stream=True))
    assert error.code == "context_length_exceeded"
    assert error.request_id
    raises(openai.NotFoundError, "no model", lambda: client(url, key).models.retrieve("nothing"))
    wrong = client(url, "wrong")
    error = raises(openai.AuthenticationError, "key", lambda: wrong.models.list())
    assert error.code == "invalid_api_key"


def cancel(url, encoders, key):
    story = [{"role": "user", "content": "Tell me a long story."}]
    chunks = client(url, key).chat.completions.create(
        model=MODEL, messages=story, stream=True, max_tokens=6000, extra_body={"ignore_eos": True})
    for _, chunk in zip(range(5), chunks):
        assert chunk.choices
    chunks.close()
    chat(url, encoders, key)


def concurrency(url, encoders, key):
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=120) as client:
            async def one(index):
                messages = [{"role": "user", "content": f"What is {index} plus 30?"}]
                chunks = await client.chat.completions.create(model=MODEL, messages=messages, temperature=0, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
            return await asyncio.gather(*[one(index) for index in range(24)])
    texts = asyncio.run(all_of_them())
    right = sum(str(index + 30) in text for index, text in enumerate(texts))
    assert right >= 20, texts


TESTS = [chat, stream, stream_helper, options, a_conversation, completions, responses, embeddings, models, errors, cancel,
         concurrency]
