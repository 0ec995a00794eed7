import Foundation
import Testing

@testable import OMLX

extension LibraryTests {
    /// What goes wrong, and how that is told.
    @Suite struct Errors {
        @Test func ofRequestsTheyComeAtOnce() async throws {
            try await withPool { pool, model in
                func refuses(_ others: JSONObject, _ code: OMLXError.Code, _ word: String) async throws {
                    let request = ChatRequest(model: "tiny-chat", messages: [.user("Hello")], others: others)
                    let error = try await failure(OMLXError.self) { _ = try pool.generate(request) }
                    #expect(error.code == code)
                    #expect(error.message.contains(word), "\(error)")
                }
                try await refuses(["temperature": -1], .invalidRequest, "temperature")
                try await refuses(["temperature": .number(.nan)], .invalidRequest, "not valid")
                try await refuses(["colour": "red"], .invalidRequest, "colour")
                try await refuses(["model": "nobody"], .notFound, "nobody")
                let lenient = try pool.generate(
                    ChatRequest(messages: [.user("Hello")], others: ["colour": "red", "max_tokens": 1]),
                    options: RequestOptions(ignoresUnknownKeys: true))
                #expect(try await lenient.result().completion?.reason == .length)
            }
        }

        @Test func thatComeLaterAreThrownByTheLoop() async throws {
            try await withPool { _, model in
                let long = String(repeating: "fox and hound ", count: 3000)
                let generation = try model.generate(ChatRequest(messages: [.user(long)]))
                let error = try await failure(OMLXError.self) { _ = try await generation.result() }
                #expect(error.code == .contextLength)
                let format = ResponseFormat.jsonSchema(["type": "array", "uniqueItems": true])
                let unsupported = try model.generate(ChatRequest(messages: [.user("Hello")], format: format))
                try await expect(.unsupported) { try await unsupported.result() }
            }
        }

        @Test func ofPoolsAndModels() async throws {
            let nowhere = PoolOptions(modelsFolder: URL(fileURLWithPath: "/no/such/folder"))
            let missing = try await failure(OMLXError.self) { _ = try await EnginePool(nowhere) }
            #expect(missing.code == .notFound)
            #expect(missing.message.contains("/no/such/folder"))
            #expect("\(missing)".hasPrefix("OMLX_E_NOT_FOUND: "))
            #expect(missing.localizedDescription == missing.message)
            var wrong = PoolOptions()
            wrong.threads = -1
            try await expect(.invalidArgument) { _ = try await EnginePool(wrong) }
            wrong = PoolOptions()
            wrong.defaultModel = "tiny\0chat"
            try await expect(.invalidArgument) { _ = try await EnginePool(wrong) }
            try await withPool { pool, _ in
                let nobody = pool.model("nobody")
                try await expect(.notFound) { try await nobody.load() }
                try await expect(.notFound) { try await nobody.unload() }
                try await expect(.notFound) { _ = try nobody.settings() }
                let cut = pool.model("tiny-chat\0")
                try await expect(.invalidArgument) { try await cut.load() }
            }
        }

        @Test func busyQueuesSayWhenToComeAgain() async throws {
            var options = PoolOptions()
            (options.maximumSequences, options.queueLength) = (1, 1)
            try await withPool(options) { _, model in
                var running: [Generation] = []
                var refusal: OMLXError?
                while refusal == nil, running.count < 10 {
                    do { running.append(try model.generate(endless())) } catch let error as OMLXError { refusal = error }
                }
                #expect(refusal?.code == .busy)
                running.forEach { $0.cancel() }
            }
        }

        @Test func codesAreOpen() {
            let newer = OMLXError(OMLXError.Code(rawValue: 4711), "from the future")
            #expect(newer.description == "OMLX_E_UNKNOWN: from the future")
            #expect(newer.code != .notFound)
        }
    }
}

/// JSON as it is written, without the library.
@Suite struct JSON {
    @Test func objectsKeepTheirOrder() throws {
        let schema = JSONSchema.object(["zebra": .string, "apple": .array(of: .integer)], required: ["zebra"])
        #expect(
            schema.value.json == #"{"type":"object","properties":{"zebra":{"type":"string"},"#
                + #""apple":{"type":"array","items":{"type":"integer"}}},"required":["zebra"],"additionalProperties":false}"#)
    }

    @Test func textsSurvive() throws {
        let text = "\u{0}\u{1f} \"quoted\" \\ \n\r\t é 🦊 \u{2028}"
        let value: JSONValue = ["text": .string(text), "numbers": [1, -2.5, 1e300], "none": nil, "yes": true]
        #expect(value.json.contains(#"\u0000\u001f"#))
        let again = try JSONValue(json: value.json)
        #expect(again == ["none": nil, "numbers": [1, -2.5, 1e300], "text": .string(text), "yes": true])
        #expect(throws: OMLXError.self) { try JSONValue(json: "{") }
    }

    @Test func aKeyIsThereOnce() {
        var object: JSONObject = ["a": 1, "b": 2, "a": 3]
        #expect(JSONValue.object(object).json == #"{"a":3,"b":2}"#)
        object["a"] = nil
        object.merge(["c": 4, "b": 5])
        #expect(JSONValue.object(object).json == #"{"b":5,"c":4}"#)
    }
}
