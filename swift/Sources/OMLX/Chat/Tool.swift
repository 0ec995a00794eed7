import Foundation

/// Something that a model can call while it answers a `ChatSession`.
///
///     struct Weather: Tool {
///         struct Arguments: Decodable, Sendable { let city: String }
///         let name = "get_weather"
///         let description = "The weather of a city."
///         let parameters = JSONSchema.object(["city": .string])
///         func call(arguments: Arguments) async throws -> String { "Sunny in \(arguments.city)." }
///     }
///
/// Calls of one answer run as child tasks of the one that reads it, at the same time, and are cancelled with it.
public protocol Tool: Sendable {
    /// What `parameters` describes.
    associatedtype Arguments: Decodable & Sendable
    /// The model reads a `String` as it is, anything else as JSON.
    associatedtype Output: Encodable & Sendable

    /// Names the tool, for the model.
    var name: String { get }
    /// Says when to call it.
    var description: String { get }
    /// The schema of its arguments, an object.
    var parameters: JSONSchema { get }

    /// Does it. What this throws ends the answer, as a `ToolCallError`.
    func call(arguments: Arguments) async throws -> Output
}

extension Tool {
    /// What the model is told.
    public var definition: ToolDefinition {
        ToolDefinition(name: name, description: description, parameters: parameters)
    }

    /// Runs a call that the model wrote. Arguments that do not fit are the model's mistake: it is told, and can do better.
    func run(_ call: ToolCall) async throws -> String {
        let arguments: Arguments
        do {
            arguments = try JSONDecoder().decode(Arguments.self, from: Data(call.arguments.utf8))
        } catch {
            return "error: the arguments do not fit the tool's parameters"
        }
        do {
            let output = try await self.call(arguments: arguments)
            if let text = output as? String { return text }
            let encoder = JSONEncoder()
            // The same result is the same text, and found in the cache.
            encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
            return String(decoding: try encoder.encode(output), as: UTF8.self)
        } catch let error as CancellationError {
            throw error
        } catch {
            throw ToolCallError(tool: name, underlyingError: error)
        }
    }
}

/// A tool failed.
public struct ToolCallError: Error, LocalizedError, CustomStringConvertible {
    /// Its name.
    public let tool: String
    /// What it threw.
    public let underlyingError: any Error

    public var description: String { "the tool \(tool) failed: \(underlyingError)" }
    public var errorDescription: String? { "The tool \(tool) failed: \(underlyingError.localizedDescription)" }
}
