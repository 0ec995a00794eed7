import Foundation
import Testing

@testable import OMLX

private let question = ChatRequest(
    messages: [.user("What is the capital of France?")],
    options: GenerationOptions(temperature: 0, maximumResponseTokens: 16))

extension LibraryTests {
    /// Pools, models, caches.
    @Suite struct Pools {
        @Test func theLibraryFits() throws {
            try OMLXLibrary.checkABI()
            #expect(!OMLXLibrary.version.isEmpty && !OMLXLibrary.mlxVersion.isEmpty)
        }

        @Test func theLogIsHeard() async throws {
            let lines = Locked<[String]>([])
            try OMLXLibrary.setLog(upTo: .debug) { _, line in lines.withLock { $0.append(line) } }
            #expect(HandleCount.callbacks.value == 1)
            // Another one takes its place.
            try OMLXLibrary.setLog(upTo: .debug) { _, line in lines.withLock { $0.append(line) } }
            #expect(await eventually { HandleCount.callbacks.value == 1 })
            try await withPool { _, model in
                try await model.load()
                try OMLXLibrary.setLog(nil)
            }
            #expect(lines.withLock { $0.count } > 0)
        }

        @Test func statusIsRead() async throws {
            try await withPool { pool, model in
                #expect(try pool.status().models.isEmpty)
                let info = try #require(pool.models().first)
                #expect(info.id == "tiny-chat" && !info.isLoaded && info.kind == .languageModel)
                #expect(info.quantization == .init(bits: 4, groupSize: 64, mode: "affine"))
                #expect(info.contextLength ?? 0 >= 4096 && info.fileBytes > 4_000_000 && info.problem == nil)
                try await model.load()
                let status = try pool.status()
                #expect(status.device == "cpu")
                #expect(status.models["tiny-chat"]?.state == "loaded")
                #expect(status.memory.used > 0 && status.memory.used <= status.memory.limit)
                #expect(status.memory.owners["tiny-chat"]?.weights ?? 0 > 4_000_000)
                #expect(try pool.models().first?.isLoaded == true)
                #expect(try pool.metrics().models["tiny-chat"]?["steps"] == 0)
                #expect(try pool.metrics().pool["models_loaded"] == 1)
                #expect(try pool.prometheusMetrics().contains("omlx_pool_models_loaded 1"))
                #expect(try await model.unload() > 4_000_000)
                #expect(try pool.status().models.isEmpty)
                try pool.setMemoryLimit(.bytes(1 << 30))
                #expect(try pool.status().memory.limit == 1 << 30)
                try await pool.rescan()
            }
        }

        @Test func modelsAreConfigured() async throws {
            try await withPool { pool, model in
                var settings = ModelSettings()
                (settings.alias, settings.isPinned, settings.contextLength) = ("chat", true, 1000)
                settings.defaults = ["max_tokens": 3, "temperature": 0]
                try await model.configure(settings)
                #expect(try model.settings() == settings)
                let request = ChatRequest(messages: [.user("Tell me a short story about a fox.")])
                let generation = try pool.model("chat").generate(request)
                #expect(generation.modelID == "tiny-chat")
                #expect(try await generation.result().completion?.usage.completionTokens == 3)
                settings = ModelSettings()
                settings.defaults = ["max_tokens": 5]
                try await model.configure(settings)
                #expect(try model.settings() == settings)
                try await model.configure(json: #"{"alias":"again"}"#)
                #expect(try model.settings().alias == "again")
            }
        }

        @Test func modelsAreAdded() async throws {
            try await withPool { pool, _ in
                let second = try await pool.addModel(at: modelFolder, id: "second")
                #expect(try pool.models().map(\.id) == ["second", "tiny-chat"])
                #expect(try await second.generate(question).result().text.contains("Paris"))
            }
        }

        @Test func textsBecomeTokens() async throws {
            try await withPool { _, model in
                let tokens = try await model.tokenize("The code of the red box is 4821.")
                #expect(tokens.count > 5)
                #expect(try await model.detokenize(tokens) == "The code of the red box is 4821.")
                #expect(try await model.tokenize("").isEmpty)
                let prompt = try await model.render(question)
                #expect(prompt == "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
            }
        }

        @Test func cachesAreUsed() async throws {
            let folder = FileManager.default.temporaryDirectory.appendingPathComponent("omlx-\(UUID())")
            defer { try? FileManager.default.removeItem(at: folder) }
            var options = PoolOptions()
            (options.cacheFolder, options.blockTokens) = (folder, 8)
            try await withPool(options) { pool, model in
                let first = try await model.generate(question).result()
                #expect(first.completion?.usage.cachedTokens == 0)
                let found = try await model.cache.find(question)
                #expect(found.pool == found.tokens && found.missing == 0 && found.stoppedBy == "complete")
                let again = try await model.generate(question).result()
                #expect(again.text == first.text)
                #expect(again.completion?.usage.cachedTokens == found.tokens)
                #expect(try await model.cache.pin(question) > 0)
                try await model.cache.unpin(question)
                try await expect(.notFound) { try await model.cache.unpin(question) }
                try await model.cache.flush()
                #expect(try model.cache.stats().cold?["bytes"] ?? 0 > 0)
                try await model.cache.clear(.pools)
                #expect(try await model.cache.find(question).pool == 0)
                #expect(try await model.cache.prefetch(question) > 0)
                try await pool.setCacheLimits(CacheLimits(coldBytes: 1 << 30))
                let limits = try pool.cacheLimits()
                #expect(limits.coldBytes == 1 << 30 && limits.coldBytesPerModel == .max)
                // They can be set as they were read.
                try await pool.setCacheLimits(CacheLimits(coldBytes: 2 << 30, coldBytesPerModel: 1 << 20))
                #expect(try pool.cacheLimits() != limits)
                try await pool.setCacheLimits(limits)
                #expect(try pool.cacheLimits() == limits)
                #expect(try await pool.cache.clear() > 0)
                #expect(try await model.cache.find(question).missing == found.tokens)
                #expect(try model.cache.stats().blocksFree ?? 0 > 0)
            }
        }

        @Test func withoutFilesTheirLimitsAreNone() async throws {
            try await withPool { pool, _ in
                let limits = try pool.cacheLimits()
                #expect(limits.hotMemory != nil && limits.coldBytes == nil && limits.coldBytesPerModel == nil)
                try await pool.setCacheLimits(limits)
                try await expect(.unsupported) { try await pool.setCacheLimits(CacheLimits(coldBytes: 1 << 30)) }
            }
        }

        @Test func whatIsToldCanBeKept() async throws {
            func check<Value: Codable & Equatable>(_ value: Value) throws {
                #expect(try JSONDecoder().decode(Value.self, from: JSONEncoder().encode(value)) == value)
            }
            try await withPool { pool, model in
                var settings = ModelSettings()
                (settings.alias, settings.timeToLiveSeconds) = ("chat", 2.5)
                settings.defaults = ["chat_template_kwargs": ["enable_thinking": false], "max_tokens": 3]
                try await model.configure(settings)
                try check(model.settings())
                try await check(#require(model.generate(question).result().completion))
                try check(CacheLimits(hotMemory: .percent(5), coldBytesPerModel: .max))
                try check(pool.cacheLimits())
                try check(pool.status())
                try check(pool.metrics())
                try check(pool.models())
                try check(model.cache.stats())
            }
            let text: JSONValue = ["text": "\u{0}é", "numbers": [1, -2.5, 1e300], "none": nil, "yes": true]
            #expect(try JSONDecoder().decode(JSONValue.self, from: JSONEncoder().encode(text)) == JSONValue(json: text.json))
            #expect(throws: DecodingError.self) { try JSONDecoder().decode(JSONObject.self, from: Data("[1]".utf8)) }
        }

        @Test func whatIsHeldIsCounted() async throws {
            try await withPool { _, model in
                #expect(handles() == [1, 0, 0, 0])
                let generation = try model.generate(endless(1))
                #expect(handles() == [1, 1, 0, 1])
                withExtendedLifetime(generation) {}
            }
        }

        @Test func aPoolThatIsForgottenIsClosed() async throws {
            var options = PoolOptions(modelsFolder: modelFolder)
            options.device = .cpu
            let generation: Generation
            do {
                let pool = try await EnginePool(options)
                generation = try pool.model("tiny-chat").generate(endless())
            }
            #expect(await eventually { HandleCount.pools.value == 0 })
            let error = try await failure(OMLXError.self) { _ = try await generation.result() }
            #expect(error.code == .closed)
        }
    }
}
