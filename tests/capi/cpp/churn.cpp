// Generations that are started and dropped at random points, from several threads: no crash, and one done event each, wherever
// anybody is left to read it. Arguments: the folder of the models, how many generations, a seed. The program that compiled this looks
// for leaks.
#include <chrono>
#include <functional>
#include <random>
#include <thread>

#include "harness.hpp"

constexpr int THREADS = 4;

static std::atomic<long> started{0}, done{0}, ended{0}, late{0}, refused{0};

// Of pulled requests: those that were read to their end, those that were dropped before, and their wake functions.
static std::atomic<long> read{0}, dropped{0}, wakes{0}, wakes_gone{0};

// What a callback sees of its own request.
struct witness {
    std::shared_ptr<std::atomic<int>> ends = std::make_shared<std::atomic<int>>(0);
    std::shared_ptr<std::atomic<int>> gone = std::make_shared<std::atomic<int>>(0);

    void operator()(const omlx::event &event) const {
        late += *ends != 0 || *gone != 0;
        if (event.is(OMLX_EVENT_KIND_DONE)) {
            ++*ends;
            done++;
        }
    }
};

static std::string request_json(std::mt19937 &random) {
    // Some share their beginnings, some do not; some end soon, some would go on.
    std::string prompt = "1,316,207,1910";
    for (auto i = random() % 20; i > 0; i--)
        prompt += ',' + std::to_string(5 + random() % 200);
    return R"({"prompt":[)" + prompt + R"(],"ignore_eos":true,"max_tokens":)" + std::to_string(1 + random() % 60) + '}';
}

static void pause(std::mt19937 &random) {
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 4 == 0 ? random() % 3000 : random() % 50));
}

static void with_callback(omlx::pool &pool, std::mt19937 &random) {
    const witness seen;
    {
        omlx::callback_request request = pool.generate(request_json(random), seen);
        started++;
        switch (random() % 5) {
        case 0: break;
        case 1: pause(random); break;
        case 2: request.wait(); break;
        case 3: request.cancel(); pause(random); break;
        default: std::thread([moved = std::move(request)] {}).join(); break;
        }
    }
    // The handle has waited for the callback: whatever happened, it has heard of the end.
    ++*seen.gone;
    ended += *seen.ends;
}

struct wake_data {
    wake_data() { wakes++; }
    wake_data(const wake_data &) = delete;
    wake_data &operator=(const wake_data &) = delete;
    ~wake_data() { wakes_gone++; }
};

// The done events that are still to come, after the handle of C++ has gone.
static int ends_without_handle(omlx::request request) {
    omlx_request *kept = request.get();
    omlx_request_retain(kept);
    { const omlx::request gone = std::move(request); }
    omlx_request_cancel(kept);
    int ends = 0;
    for (const omlx_event *event = nullptr; omlx_request_next(kept, -1, &event, nullptr) == OMLX_OK;)
        ends += event->kind == OMLX_EVENT_KIND_DONE;
    omlx_request_release(kept);
    return ends;
}

static void pulled(omlx::pool &pool, std::mt19937 &random) {
    omlx::request request = pool.generate(request_json(random));
    int ends = 0;
    const auto take = [&](const std::optional<omlx::event> &event) {
        late += event && ends > 0;
        ends += event && event->is(OMLX_EVENT_KIND_DONE);
    };
    // Beyond the end there is nothing.
    for (auto i = random() % 12; i > 0; i--)
        take(random() % 2 == 0 ? request.try_next() : request.next());
    if (random() % 3 == 0)
        request.on_wake([kept = std::make_unique<wake_data>()]() noexcept {});
    if (random() % 4 == 0)
        request.cancel();
    switch (random() % 4) {
    case 0:
        while (!request.over())
            take(request.next());
        take(request.next());
        break;
    case 1:
        ends += ends_without_handle(std::move(request));
        break;
    default:
        // Nobody can read the rest.
        CHECK(ends <= 1);
        dropped++;
        return;
    }
    CHECK(ends == 1);
    read++;
}

static void churn(omlx::pool &pool, long count, unsigned seed) {
    std::mt19937 random(seed);
    for (long i = 0; i < count;) {
        try {
            if (random() % 2 == 0)
                with_callback(pool, random);
            else
                pulled(pool, random);
            i++;
        } catch (const omlx::error &error) {
            CHECK(error.code() == OMLX_E_BUSY);
            refused++;
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 4)
        return 2;
    const long count = std::stol(argv[2]);
    {
        omlx::pool pool = open_pool(argv[1]);
        std::vector<std::thread> threads;
        for (int i = 0; i < THREADS; i++)
            threads.emplace_back(churn, std::ref(pool), count / THREADS, static_cast<unsigned>(std::stoul(argv[3]) + i));
        for (std::thread &thread : threads)
            thread.join();
        // Nothing is left running, once the last ones that were dropped have ended: within a step.
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
        while (!contains(pool.status(), "\"requests\":0") && std::chrono::steady_clock::now() < end)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        CHECK(contains(pool.status(), "\"requests\":0"));
    }
    CHECK(started > 0 && done == started && ended == started && late == 0);
    CHECK(read > 0 && dropped > 0 && wakes > 0 && wakes_gone == wakes);
    std::cout << started << " with a callback, " << read << " read to the end, " << dropped << " dropped, " << refused
              << " refused\n";
    return finish("churn");
}
