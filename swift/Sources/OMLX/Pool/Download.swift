import COMLX

/// A download of a model. When nobody holds it any more, it is cancelled.
///
///     let download = try pool.download("org/name")
///     for await progress in download.updates { print(progress.bytesDone, "of", progress.bytesTotal) }
///     let model = pool.model(try await download.result().id)
public final class Download: Sendable {
    private let handle: DownloadHandle

    init(_ handle: DownloadHandle) {
        self.handle = handle
    }

    /// How far it is.
    public func progress() throws -> DownloadProgress {
        var progress = omlx_download_progress()
        progress.struct_size = UInt32(MemoryLayout<omlx_download_progress>.size)
        try check { omlx_download_status(handle.pointer, &progress, $0) }
        return DownloadProgress(progress)
    }

    /// How far it is, from now on: at once, with every new state, and a few times a second while bytes come. A reader that is
    /// slow sees the newest state only. It ends when the download is over, or when somebody else asks for updates.
    public var updates: AsyncStream<DownloadProgress> {
        AsyncStream(bufferingPolicy: .bufferingNewest(1)) { continuation in
            let receiver = ProgressReceiver(continuation)
            let onProgress: omlx_progress_fn = { data, progress in
                if let progress { lent(data, as: ProgressReceiver.self)?.continuation.yield(DownloadProgress(progress.pointee)) }
                return 0
            }
            // When it fails the receiver goes, too, and the stream ends.
            try? check { omlx_download_set_callback(handle.pointer, onProgress, lend(receiver), takeBack, $0) }
        }
    }

    /// Waits until it is over, and says what came of it. Cancelling the task cancels the download; so does `cancel`, and
    /// this throws `cancelled` then.
    public func result() async throws -> DownloadResult {
        let handle = handle
        do {
            return try await withTaskCancellationHandler {
                try await blocking {
                    var json: OpaquePointer?
                    try check { omlx_download_wait(handle.pointer, -1, &json, $0) }
                    return try decode(DownloadResult.self, from: take(json))
                }
            } onCancel: {
                omlx_download_cancel(handle.pointer)
            }
        } catch let error as OMLXError where error.code == .cancelled {
            try Task.checkCancellation()
            throw error
        }
    }

    /// Asks it to end; what has been fetched stays for the next attempt.
    public func cancel() {
        omlx_download_cancel(handle.pointer)
    }
}

extension EnginePool {
    /// Starts to fetch a model from a hub into the pool's folder of models, and returns at once.
    public func download(_ repository: String, options: DownloadOptions = DownloadOptions()) throws -> Download {
        var download: OpaquePointer?
        try check { error in
            withBytes(of: options.json(repository)) {
                omlx_download_start(handle.pointer, $0, $1, &download, error)
            }
        }
        guard let download else { throw OMLXError(.internal, "no download came back") }
        return Download(DownloadHandle(owning: download))
    }
}

/// What is fetched, and from where; `nil` is the default. `omlx_download_start` of the C header describes it.
public struct DownloadOptions: Sendable, Hashable {
    /// A branch, tag or commit.
    public var revision: String?
    /// Exactly these files.
    public var files: [String] = []
    /// Files that one of these describes.
    public var patterns: [String] = []
    /// The folder of models.
    public var folder: String?
    /// URL of the hub.
    public var endpoint: String?
    /// Access token; sent to the endpoint alone.
    public var token: String?
    /// Do not use the network.
    public var isOffline: Bool?
    /// At the same time.
    public var connections: Int?

    /// All defaults, but for what is given.
    public init(revision: String? = nil, endpoint: String? = nil, token: String? = nil) {
        self.revision = revision
        self.endpoint = endpoint
        self.token = token
    }

    func json(_ repository: String) -> String {
        var object: JSONObject = ["repo": .string(repository)]
        object["revision"] = revision.map { .string($0) }
        if !files.isEmpty { object["files"] = .array(files.map { .string($0) }) }
        if !patterns.isEmpty { object["patterns"] = .array(patterns.map { .string($0) }) }
        object["folder"] = folder.map { .string($0) }
        object["endpoint"] = endpoint.map { .string($0) }
        object["token"] = token.map { .string($0) }
        object["offline"] = isOffline.map { .bool($0) }
        object["connections"] = connections.map { .integer(Int64($0)) }
        return JSONValue.object(object).json
    }
}

/// How far a download is.
public struct DownloadProgress: Sendable, Hashable, Codable {
    /// What it is doing.
    public let state: DownloadState
    /// Bytes that are there. Falls when a file has to be fetched anew.
    public let bytesDone: UInt64
    /// Bytes of all files; 0 until they are listed.
    public let bytesTotal: UInt64
    /// Bytes that were there before.
    public let bytesKept: UInt64
    /// Files that are complete and checked.
    public let filesDone: Int
    /// All files; 0 until they are listed.
    public let filesTotal: Int
    /// Requests that were repeated.
    public let retries: Int

    init(_ progress: omlx_download_progress) {
        state = DownloadState(rawValue: progress.state)
        bytesDone = progress.bytes_done
        bytesTotal = progress.bytes_total
        bytesKept = progress.bytes_kept
        filesDone = Int(clamping: progress.files_done)
        filesTotal = Int(clamping: progress.files_total)
        retries = Int(clamping: progress.retries)
    }
}

/// What a download is doing. Open: newer libraries may have more states.
public struct DownloadState: RawRepresentable, Sendable, Hashable, Codable {
    /// The `omlx_download_state`.
    public let rawValue: UInt32

    /// The state with that number.
    public init(rawValue: UInt32) {
        self.rawValue = rawValue
    }

    public static let listing = Self(rawValue: OMLX_DOWNLOAD_STATE_LISTING.rawValue)
    public static let fetching = Self(rawValue: OMLX_DOWNLOAD_STATE_FETCHING.rawValue)
    public static let installing = Self(rawValue: OMLX_DOWNLOAD_STATE_INSTALLING.rawValue)
    public static let done = Self(rawValue: OMLX_DOWNLOAD_STATE_DONE.rawValue)
    public static let failed = Self(rawValue: OMLX_DOWNLOAD_STATE_FAILED.rawValue)
    public static let cancelled = Self(rawValue: OMLX_DOWNLOAD_STATE_CANCELLED.rawValue)
}

/// What came of a download.
public struct DownloadResult: Sendable, Hashable, Codable {
    /// The model's id.
    public let id: String
    /// Its path.
    public let folder: String
    /// `nil` for a folder that something else put there.
    public let commit: String?
    /// False if everything was there already.
    public let changed: Bool
}

/// Ends its stream when the library gives it back.
private final class ProgressReceiver: Sendable {
    let continuation: AsyncStream<DownloadProgress>.Continuation

    init(_ continuation: AsyncStream<DownloadProgress>.Continuation) {
        self.continuation = continuation
    }

    deinit {
        continuation.finish()
    }
}
