// Types of Apple's FoundationModels in a ChatSession: @Generable types as answers, and its tools. For hosts that fall back to a
// local model where Apple's is not available, or offer both. Written against the documentation of macOS 26; never compiled.

#if canImport(FoundationModels)
import Foundation
import FoundationModels
import OMLX

@available(macOS 26.0, *)
extension ChatSession {
    /// The answer to a prompt as a `@Generable` type: its schema holds the answer to its form.
    public nonisolated func respond<Content: Generable & Sendable>(
        to prompt: String, generating _: Content.Type = Content.self, options: OMLX.GenerationOptions? = nil
    ) async throws -> OMLX.Response<Content> {
        let schema = try JSONSchema(Content.generationSchema)
        let response = try await respond(to: prompt, as: GeneratedJSON.self, schema: schema, options: options)
        let content = try Content(GeneratedContent(json: response.content.text))
        return response.map { _ in content }
    }
}

@available(macOS 26.0, *)
extension JSONSchema {
    /// The JSON schema that a schema of FoundationModels is written as.
    public init(_ schema: GenerationSchema) throws {
        try self.init(json: String(decoding: JSONEncoder().encode(schema), as: UTF8.self))
    }
}

/// A tool of FoundationModels as a tool of a `ChatSession`.
@available(macOS 26.0, *)
public struct FoundationTool<Wrapped: FoundationModels.Tool>: OMLX.Tool {
    public let wrapped: Wrapped
    public let parameters: JSONSchema
    public var name: String { wrapped.name }
    public var description: String { wrapped.description }

    /// Wraps a tool.
    public init(_ wrapped: Wrapped) throws {
        self.wrapped = wrapped
        parameters = try JSONSchema(wrapped.parameters)
    }

    public func call(arguments: GeneratedJSON) async throws -> String {
        let arguments = try Wrapped.Arguments(GeneratedContent(json: arguments.text))
        let output = try await wrapped.call(arguments: arguments)
        // Text as it is, generated content as JSON.
        if let text = output as? String { return text }
        if let content = output as? any ConvertibleToGeneratedContent { return content.generatedContent.jsonString }
        return String(describing: output)
    }
}

/// JSON that is read by FoundationModels, not by `Decodable`.
public struct GeneratedJSON: Decodable, Sendable {
    public let text: String

    public init(from decoder: any Decoder) throws {
        text = try JSONValue(from: decoder).json
    }
}
#endif
