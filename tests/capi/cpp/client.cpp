// The C++ header against the bundled model: requests in both forms, errors, exceptions of callbacks, and what lives how long.
// Arguments: the folders of the models and of the encoders, and an empty one.
#include <chrono>
#include <stdexcept>
#include <thread>

#include "harness.hpp"

using namespace std::chrono_literals;

static const char short_json[] = R"({"prompt":[1,316,207,1910],"max_tokens":4,"temperature":0,"ignore_eos":true})";
static const char long_json[] = R"({"prompt":[1,316,207,1910],"max_tokens":1500,"temperature":0,"ignore_eos":true})";

static void requests_are_ranges(omlx::pool &pool) {
    omlx::request request = pool.generate(short_json);
    std::string text;
    std::size_t tokens = 0, done = 0;
    for (const omlx::event &event : request) {
        text += event.text();
        tokens += event.tokens().size();
        done += event.is(OMLX_EVENT_KIND_DONE);
        CHECK(!event.is(OMLX_EVENT_KIND_DONE) || event.usage().completion_tokens == 4);
    }
    CHECK(tokens == 4 && done == 1 && !text.empty());
    CHECK(request.over() && !request.next() && !request.try_next() && request.model() == "tiny-chat");
    CHECK(request.result().finish_reason == OMLX_FINISH_REASON_LENGTH && request.result().usage.prompt_tokens == 4);

    const omlx::answer answer = pool.generate(short_json).answer();
    CHECK(answer.text == text && answer.tokens.size() == 4 && answer.finish_reason == OMLX_FINISH_REASON_LENGTH);
    std::string again;
    for (const omlx::event &event : pool.generate(short_json)) // The request lives as long as the loop.
        again += event.text();
    CHECK(again == text);
}

static void several_answers_and_tool_calls(omlx::pool &pool) {
    const auto answers = pool.generate(R"({"prompt":[1,316],"n":3,"max_tokens":3,"temperature":0,"ignore_eos":true})").answers();
    CHECK(answers.size() == 3);
    for (const omlx::answer &answer : answers)
        CHECK(answer.finish_reason == OMLX_FINISH_REASON_LENGTH && answer.tokens == answers[0].tokens && answer.tokens.size() == 3);
    const omlx::answer answer = pool.generate(
        R"({"messages":[{"role":"user","content":"Set a timer for 97 minutes."}],"temperature":0,"tools":[
            {"type":"function","function":{"name":"set_timer","description":"Start a timer.","parameters":{
            "type":"object","properties":{"minutes":{"type":"integer"}},"required":["minutes"]}}}]})").answer();
    CHECK(answer.finish_reason == OMLX_FINISH_REASON_TOOL_CALLS && answer.tool_calls.size() == 1 && answer.text.empty());
    if (answer.tool_calls.size() == 1) {
        CHECK(answer.tool_calls[0].name == "set_timer" && answer.tool_calls[0].arguments == R"({"minutes": 97})");
        CHECK(answer.tool_calls[0].id.rfind("call_", 0) == 0);
    }
}

static void pulling(omlx::pool &pool) {
    omlx::request request = pool.generate(long_json);
    std::atomic<int> woken{0};
    request.on_wake([&woken]() noexcept { woken++; });
    CHECK(request.next()->is(OMLX_EVENT_KIND_TEXT));
    while (woken == 0)
        std::this_thread::sleep_for(1ms);
    request.remove_wake();
    request.cancel();
    std::optional<omlx::event> last;
    while (!request.over()) {
        if (auto event = request.try_next(20ms))
            last = event;
    }
    CHECK(last && last->is(OMLX_EVENT_KIND_DONE) && last->status() == OMLX_E_CANCELLED);
    CHECK(request.result().finish_reason == OMLX_FINISH_REASON_CANCELLED);
    omlx::request whole = pool.generate(long_json);
    whole.cancel();
    CHECK(whole.answer().finish_reason == OMLX_FINISH_REASON_CANCELLED);
    // Told of loading, which is over at once where the model is there.
    omlx::request_options options;
    options.loading_events = options.lenient = true;
    CHECK(pool.generate(R"({"prompt":[5],"unheard_of":1,"max_tokens":1,"ignore_eos":true})", options).answer().tokens.size() == 1);
}

static void callbacks(omlx::pool &pool) {
    std::size_t tokens = 0, done = 0;
    auto request = pool.generate(short_json, [&](const omlx::event &event) {
        tokens += event.tokens().size();
        done += event.is(OMLX_EVENT_KIND_DONE);
    });
    const omlx::outcome outcome = request.wait();
    CHECK(tokens == 4 && done == 1 && outcome.usage.completion_tokens == 4);
    CHECK(outcome.finish_reason == OMLX_FINISH_REASON_LENGTH && request.wait_for(0ms));

    // A callable that cannot be copied, and one that has enough.
    auto owned = std::make_unique<int>(0);
    auto moved = pool.generate(long_json, [owned = std::move(owned)](const omlx::event &event) {
        return !event.is(OMLX_EVENT_KIND_TEXT) || ++*owned < 3;
    });
    CHECK(moved.wait().finish_reason == OMLX_FINISH_REASON_CANCELLED);
    moved = pool.generate(long_json, [](const omlx::event &) {});
    moved.cancel();
    CHECK(moved.wait().finish_reason == OMLX_FINISH_REASON_CANCELLED);
    const omlx::callback_request taken = std::move(moved);
    CHECK_THROWS(OMLX_E_INVALID_ARGUMENT, moved.wait());
    CHECK(moved.get() == nullptr && taken.get() != nullptr);
}

struct own_exception : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Neither crosses C; the owner gets it, and the request ends.
static void callbacks_may_throw(omlx::pool &pool) {
    std::atomic<int> calls{0};
    auto request = pool.generate(long_json, [&](const omlx::event &) -> bool {
        calls++;
        throw own_exception("enough");
    });
    try {
        request.wait();
        CHECK(!"nothing was thrown");
    } catch (const own_exception &thrown) {
        CHECK(std::string(thrown.what()) == "enough");
    }
    CHECK(calls == 1);
    CHECK(request.wait_for(0ms));
    pool.generate(long_json, [](const omlx::event &) { throw 5; }); // Nobody waits: it is dropped.
    CHECK(pool.generate(short_json).answer().tokens.size() == 4);
}

// When a handle is gone, so is its callback.
static void handles_end_their_callbacks(omlx::pool &pool) {
    for (int i = 0; i < 20; i++) {
        std::atomic<bool> alive{true};
        std::atomic<int> late{0}, texts{0};
        {
            auto request = pool.generate(long_json, [&](const omlx::event &event) {
                late += !alive;
                texts += event.is(OMLX_EVENT_KIND_TEXT);
                std::this_thread::sleep_for(1ms);
            });
            while (i % 2 == 0 && texts == 0)
                std::this_thread::yield();
        }
        alive = false;
        std::this_thread::sleep_for(2ms);
        CHECK(late == 0);
    }
    // In its own callback it cannot wait for itself.
    std::atomic<bool> assigned{false};
    std::atomic<int> gone{0};
    std::optional<omlx::callback_request> handle;
    handle.emplace(pool.generate(long_json, [&](const omlx::event &event) {
        while (!assigned)
            std::this_thread::yield();
        if (event.is(OMLX_EVENT_KIND_DONE))
            gone++;
        else
            handle.reset();
    }));
    assigned = true;
    while (gone == 0)
        std::this_thread::sleep_for(1ms);
    CHECK(!handle);
    // A pool that goes first ends what it has, and the handles notice.
    omlx::pool other = open_pool("models");
    auto request = other.generate(long_json, [](const omlx::event &) {});
    omlx::request pulled = other.generate(long_json);
    { const omlx::pool gone_pool = std::move(other); }
    CHECK_THROWS(OMLX_E_CLOSED, request.wait());
    CHECK_THROWS(OMLX_E_CLOSED, pulled.answer());
    CHECK_THROWS(OMLX_E_INVALID_ARGUMENT, other.status());
}

static void errors(omlx::pool &pool) {
    try {
        pool.generate(R"({"model":"nothing","prompt":"x"})");
        CHECK(!"nothing was thrown");
    } catch (const omlx::error &thrown) {
        CHECK(thrown.code() == OMLX_E_NOT_FOUND && contains(thrown.what(), "OMLX_E_NOT_FOUND: "));
        CHECK(contains(thrown.message(), "nothing") && thrown.retry_after() == 0ms);
    }
    CHECK_THROWS(OMLX_E_INVALID_REQUEST, pool.generate("{"));
    CHECK_THROWS(OMLX_E_INVALID_REQUEST, pool.generate("{", [](const omlx::event &) {}));
    CHECK_THROWS(OMLX_E_INVALID_ARGUMENT, pool.generate(std::string_view()));
    // Refused later: by what reads it.
    const char *late = R"({"prompt":[99999999]})";
    CHECK_THROWS(OMLX_E_INVALID_REQUEST, pool.generate(late).answer());
    CHECK_THROWS(OMLX_E_INVALID_REQUEST, pool.generate(late, [](const omlx::event &) {}).wait());
    CHECK_THROWS(OMLX_E_INVALID_REQUEST, [&] {
        for (const omlx::event &event : pool.generate(late))
            CHECK(!event.is(OMLX_EVENT_KIND_DONE));
    }());
    CHECK_THROWS(OMLX_E_NOT_FOUND, open_pool("no/such/folder"));
    CHECK_THROWS(OMLX_E_INVALID_ARGUMENT, pool.load(std::string_view("a\0b", 3)));

    omlx::pool_options options;
    options.models_dir = "models";
    options.queue_length = options.max_sequences = 1;
    omlx::pool small(options);
    std::vector<omlx::request> running;
    try {
        for (int i = 0; i < 100; i++)
            running.push_back(small.generate(long_json));
        CHECK(!"a queue of one took a hundred");
    } catch (const omlx::error &thrown) {
        CHECK(thrown.code() == OMLX_E_BUSY && thrown.retry_after() > 0ms);
    }
}

static void texts_and_models(omlx::pool &pool) {
    const std::vector<std::uint32_t> tokens = pool.tokenize("Hello there");
    CHECK(!tokens.empty() && pool.detokenize(tokens) == "Hello there");
    CHECK(pool.tokenize("", "tiny-chat").empty() && pool.detokenize({}).empty());
    const std::string question = omlx::json_string("a \"quoted\"\n\\ text\x01, \xc3\xa4");
    CHECK(question == "\"a \\\"quoted\\\"\\u000a\\\\ text\\u0001, \xc3\xa4\"");
    CHECK(contains(pool.render_template(R"({"messages":[{"role":"user","content":)" + question + "}]}"), "a \"quoted\"\n\\ text"));
    CHECK(contains(pool.models(), "\"tiny-chat\"") && contains(pool.status(), "\"memory\""));
    CHECK(contains(pool.metrics(), "\"models\"") && contains(pool.metrics(OMLX_METRICS_FORMAT_PROMETHEUS), "# TYPE"));
    pool.configure("tiny-chat", R"({"alias":"small"})");
    CHECK(contains(pool.settings("tiny-chat"), "small"));
    pool.load("small");
    CHECK(pool.unload("tiny-chat", true) > 0 && pool.unload("tiny-chat") == 0);
    pool.set_memory_limit(0, 50);
    pool.add_model("models/tiny-chat", "second");
    CHECK(contains(pool.models(), "\"second\""));
    pool.rescan();
    CHECK(!omlx::version().empty() && !omlx::mlx_version().empty());
}

static void vectors_and_scores(const char *folder) {
    omlx::pool pool = open_pool(folder);
    const omlx::embeddings vectors = pool.embed(R"({"model":"bert","input":["a river","a stone"]})").embeddings();
    CHECK(vectors.rows == 2 && vectors.columns > 1 && vectors[1].size() == vectors.columns && vectors.truncated == 0);
    CHECK(vectors.values.size() == vectors.rows * vectors.columns && vectors[1].data() == &vectors.values[vectors.columns]);
    const omlx::scores scores =
        pool.rerank(R"({"model":"bert-rerank","query":"a river","documents":["a stone","a river"]})").scores();
    CHECK(scores.values.size() == 2 && scores.order.size() == 2);
    CHECK(scores.values[scores.order[0]] >= scores.values[scores.order[1]]);
    std::size_t rows = 0;
    pool.embed(R"({"model":"bert","input":"a"})", [&](const omlx::event &event) { rows += event.rows(); }).wait();
    pool.rerank(R"({"model":"bert-rerank","query":"a","documents":["b"]})", [&](const omlx::event &e) { rows += e.rows(); }).wait();
    CHECK(rows == 2);
    omlx::request cancelled = pool.embed(R"({"model":"bert","input":"a"})");
    cancelled.cancel();
    try {
        CHECK(cancelled.embeddings().rows == 1); // It was faster.
    } catch (const omlx::error &thrown) {
        CHECK(thrown.code() == OMLX_E_CANCELLED);
    }
    CHECK_THROWS(OMLX_E_UNSUPPORTED, pool.embed(R"({"model":"bert-rerank","input":"a"})").embeddings());
}

static void caches(const std::string &folder) {
    omlx::pool_options options;
    options.models_dir = "models";
    options.cache_dir = folder.c_str();
    omlx::pool pool(options);
    const char *json = R"({"prompt":[1,316,207,1910,5,6,7,8,9,10,11,12,13,14,15,16],"max_tokens":1,"temperature":0,"ignore_eos":true})";
    pool.load("tiny-chat");
    CHECK(pool.generate(json).answer().tokens.size() == 1);
    CHECK(contains(pool.cache_find(json), "\"pool\":15") && pool.cache_prefetch(json) == 15);
    CHECK(pool.cache_pin(json) >= 15);
    pool.cache_unpin(json);
    CHECK_THROWS(OMLX_E_NOT_FOUND, pool.cache_unpin(json));
    pool.cache_flush(60s);
    omlx::cache_limits limits;
    limits.cold_bytes = 1 << 20;
    pool.set_cache_limits(limits);
    CHECK(pool.get_cache_limits().cold_bytes == 1 << 20);
    CHECK(contains(pool.cache_stats(), "\"cold_limit\":1048576"));
    CHECK_THROWS(OMLX_E_NOT_FOUND, pool.cache_stats("nobody"));
    CHECK(pool.cache_clear({}, OMLX_CACHE_TIER_POOLS) > 0 && contains(pool.cache_find(json), "\"pool\":0"));
    pool.cache_clear("tiny-chat");
}

static void downloads(omlx::pool &pool, const std::string &folder) {
    const std::string start = R"({"repo":"org/name","folder":)" + omlx::json_string(folder);
    const std::string offline = start + R"(,"offline":true})";
    CHECK_THROWS(OMLX_E_OFFLINE, pool.download(offline).wait());
    std::atomic<int> calls{0};
    std::atomic<std::uint32_t> state{0};
    omlx::download watched = pool.download(offline, [&](const omlx_download_progress &progress) {
        calls++;
        state = progress.state;
    });
    CHECK_THROWS(OMLX_E_OFFLINE, watched.wait());
    CHECK(calls > 0 && state == OMLX_DOWNLOAD_STATE_FAILED && watched.status().state == OMLX_DOWNLOAD_STATE_FAILED);
    CHECK_THROWS(OMLX_E_INVALID_REQUEST, pool.download("{}", [](const omlx_download_progress &) {}));
    // Nothing listens there: it goes on trying until somebody has had enough.
    const std::string deaf = start + R"(,"endpoint":"http://127.0.0.1:1"})";
    omlx::download throwing = pool.download(deaf, [](const omlx_download_progress &) { throw own_exception("no more"); });
    try {
        throwing.wait();
        CHECK(!"nothing was thrown");
    } catch (const own_exception &) {
    }
    omlx::download stopped = pool.download(deaf, [](const omlx_download_progress &) { return false; });
    CHECK_THROWS(OMLX_E_CANCELLED, stopped.wait());
    omlx::download cancelled = pool.download(deaf);
    CHECK(!cancelled.wait_for(0ms));
    cancelled.cancel();
    CHECK_THROWS(OMLX_E_CANCELLED, cancelled.wait());
    pool.download(deaf, [](const omlx_download_progress &) {}); // Dropped at once.
}

static void log_hook() {
    std::atomic<int> lines{0};
    omlx::set_log_hook(OMLX_LOG_LEVEL_DEBUG, [&lines](omlx_log_level, std::string_view line) noexcept { lines += !line.empty(); });
    open_pool("models").load("tiny-chat");
    omlx::remove_log_hook();
    CHECK(lines > 0);
}

int main(int argc, char **argv) {
    if (argc != 4)
        return 2;
    {
        omlx::pool pool = open_pool(argv[1]);
        requests_are_ranges(pool);
        several_answers_and_tool_calls(pool);
        pulling(pool);
        callbacks(pool);
        callbacks_may_throw(pool);
        handles_end_their_callbacks(pool);
        errors(pool);
        texts_and_models(pool);
        downloads(pool, std::string(argv[3]) + "/downloads");
        pool.close();
        CHECK_THROWS(OMLX_E_CLOSED, pool.generate(short_json));
    }
    vectors_and_scores(argv[2]);
    caches(std::string(argv[3]) + "/cache");
    log_hook();
    return finish("client");
}
