import Foundation

#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

/// Reads the server-sent events of a streamed chat completion. (`URLSession.bytes` is not there on Linux.)
final class EventStream: NSObject, URLSessionDataDelegate, @unchecked Sendable {
    // Unchecked: the session calls its delegate from one queue, one call at a time, and nobody else touches the state.
    private let continuation: AsyncThrowingStream<String, any Error>.Continuation
    private var partial = Data()
    private var failure: URLResponse?

    private init(_ continuation: AsyncThrowingStream<String, any Error>.Continuation) {
        self.continuation = continuation
    }

    /// Sends a request, and its answer's text to `continuation`; when nobody reads that any more, the connection is closed.
    static func start(_ request: URLRequest, _ continuation: AsyncThrowingStream<String, any Error>.Continuation) {
        let configuration = URLSessionConfiguration.ephemeral
        // A model that is being loaded may be silent for long.
        configuration.timeoutIntervalForRequest = 600
        let session = URLSession(configuration: configuration, delegate: EventStream(continuation), delegateQueue: nil)
        let task = session.dataTask(with: request)
        continuation.onTermination = { _ in
            task.cancel()
            // The session holds its delegate until then.
            session.invalidateAndCancel()
        }
        task.resume()
    }

    func urlSession(
        _: URLSession, dataTask _: URLSessionDataTask, didReceive response: URLResponse,
        completionHandler: @escaping (URLSession.ResponseDisposition) -> Void
    ) {
        if (response as? HTTPURLResponse)?.statusCode != 200 { failure = response }
        completionHandler(.allow)
    }

    func urlSession(_: URLSession, dataTask _: URLSessionDataTask, didReceive data: Data) {
        partial += data
        guard failure == nil else { return }
        while let end = partial.firstIndex(of: 10) {
            let line = String(decoding: partial[partial.startIndex..<end], as: UTF8.self)
            partial = Data(partial[partial.index(after: end)...])
            if let text = Self.text(of: line) { continuation.yield(text) }
        }
    }

    func urlSession(_: URLSession, task _: URLSessionTask, didCompleteWithError error: (any Error)?) {
        do {
            if let error { throw error }
            if let failure { try ServerError.check(failure, partial) }
            continuation.finish()
        } catch {
            continuation.finish(throwing: error)
        }
    }

    /// The text of a line of the stream, if it has some.
    static func text(of line: String) -> String? {
        struct Chunk: Decodable {
            struct Choice: Decodable {
                struct Delta: Decodable { let content: String? }
                let delta: Delta
            }
            let choices: [Choice]
        }
        guard line.hasPrefix("data: ") else { return nil }
        let chunk = try? JSONDecoder().decode(Chunk.self, from: Data(line.dropFirst(6).utf8))
        return chunk?.choices.first?.delta.content.flatMap { $0.isEmpty ? nil : $0 }
    }
}
