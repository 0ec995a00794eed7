import Foundation

#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

/// Talks to a server over HTTP.
public struct ServerClient: Sendable {
    /// Its address.
    public let url: URL
    /// If it wants one.
    public let apiKey: String?

    /// A client.
    public init(_ url: URL, apiKey: String? = nil) {
        self.url = url
        self.apiKey = apiKey
    }

    /// What the server tells of itself.
    public func stats() async throws -> ServerStats {
        let (data, response) = try await URLSession.shared.data(for: request("admin/api/status"))
        try ServerError.check(response, data)
        return try JSONDecoder().decode(ServerStats.self, from: data)
    }

    /// The ids of its models.
    public func models() async throws -> [String] {
        let (data, response) = try await URLSession.shared.data(for: request("v1/models"))
        try ServerError.check(response, data)
        return try JSONDecoder().decode(ModelList.self, from: data).data.map(\.id)
    }

    /// The pieces of an answer. Leaving the loop, or cancelling the task, ends it at the server, too.
    public func chat(_ messages: [ChatLine], model: String? = nil) -> AsyncThrowingStream<String, any Error> {
        AsyncThrowingStream { continuation in
            do {
                let body = ChatBody(model: model ?? "default", messages: messages.map(ChatBody.Message.init), stream: true)
                var request = request("v1/chat/completions")
                request.httpMethod = "POST"
                request.httpBody = try JSONEncoder().encode(body)
                request.setValue("application/json", forHTTPHeaderField: "Content-Type")
                EventStream.start(request, continuation)
            } catch {
                continuation.finish(throwing: error)
            }
        }
    }

    private func request(_ path: String) -> URLRequest {
        var request = URLRequest(url: url.appendingPathComponent(path))
        if let apiKey { request.setValue("Bearer \(apiKey)", forHTTPHeaderField: "Authorization") }
        return request
    }

    private struct ModelList: Decodable {
        struct Model: Decodable { let id: String }
        let data: [Model]
    }

    private struct ChatBody: Encodable {
        struct Message: Encodable {
            let role: String
            let content: String

            init(_ line: ChatLine) {
                (role, content) = (line.role.rawValue, line.text)
            }
        }
        let model: String
        let messages: [Message]
        let stream: Bool
    }
}

/// What somebody said in a chat.
public struct ChatLine: Sendable, Hashable, Identifiable {
    /// Who spoke.
    public enum Role: String, Sendable {
        case user, assistant
    }

    public let id: UUID
    public let role: Role
    public var text: String

    /// A line.
    public init(_ role: Role, _ text: String) {
        (id, self.role, self.text) = (UUID(), role, text)
    }
}

/// A server refused a request.
public struct ServerError: Error, LocalizedError, Hashable {
    /// The HTTP status.
    public let status: Int
    /// What the server said.
    public let message: String

    public var errorDescription: String? { message }

    static func check(_ response: URLResponse, _ body: Data) throws {
        guard let status = (response as? HTTPURLResponse)?.statusCode, status != 200 else { return }
        struct Body: Decodable {
            struct Details: Decodable { let message: String }
            let error: Details
        }
        let message = try? JSONDecoder().decode(Body.self, from: body).error.message
        throw ServerError(status: status, message: message ?? "the server answers with \(status)")
    }
}
