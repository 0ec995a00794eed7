import COMLX
import Foundation

/// A failure of the library: what kind it is of, for programs, and what went wrong, for people.
public struct OMLXError: Error, Sendable, Hashable {
    /// The class of a failure. Open: libraries that are newer than this package may have more.
    public struct Code: RawRepresentable, Sendable, Hashable {
        /// The `omlx_status`.
        public let rawValue: Int32

        /// The class with that number.
        public init(rawValue: Int32) {
            self.rawValue = rawValue
        }
    }

    /// The class.
    public let code: Code
    /// What went wrong.
    public let message: String
    /// After which time it makes sense to try again; with `busy`, if it is known.
    public let retryAfter: Duration?

    /// An error.
    public init(_ code: Code, _ message: String, retryAfter: Duration? = nil) {
        self.code = code
        self.message = message
        self.retryAfter = retryAfter
    }
}

extension OMLXError.Code {
    private init(_ status: some RawRepresentable<UInt32>) {
        self.init(rawValue: Int32(bitPattern: status.rawValue))
    }

    /// An argument or option out of range, text with a NUL character, a sequence that is read twice.
    public static let invalidArgument = Self(OMLX_E_INVALID_ARGUMENT)
    /// The request has an unknown key, or a value out of range.
    public static let invalidRequest = Self(OMLX_E_INVALID_REQUEST)
    /// No such model, file or folder.
    public static let notFound = Self(OMLX_E_NOT_FOUND)
    /// The library cannot do that.
    public static let unsupported = Self(OMLX_E_UNSUPPORTED)
    /// The model's folder is damaged.
    public static let invalidModel = Self(OMLX_E_INVALID_MODEL)
    /// The prompt does not fit the model's context.
    public static let contextLength = Self(OMLX_E_CONTEXT_LENGTH)
    /// The request was cancelled: by the host, or because its model was unloaded.
    public static let cancelled = Self(OMLX_E_CANCELLED)
    /// The pool is closed.
    public static let closed = Self(OMLX_E_CLOSED)
    /// A queue is full (see `OMLXError.retryAfter`), or a session is answering already.
    public static let busy = Self(OMLX_E_BUSY)
    /// The memory limit does not allow it.
    public static let outOfMemory = Self(OMLX_E_OUT_OF_MEMORY)
    /// The operating system refused an input or output operation.
    public static let io = Self(OMLX_E_IO)
    /// The time allowed has passed.
    public static let timeout = Self(OMLX_E_TIMEOUT)
    /// The chat template failed or refused the messages.
    public static let template = Self(OMLX_E_TEMPLATE)
    /// MLX failed or has the wrong version.
    public static let backend = Self(OMLX_E_BACKEND)
    /// A defect of the library.
    public static let `internal` = Self(OMLX_E_INTERNAL)
    /// The hub asks for an access token, or for its terms to be accepted.
    public static let unauthorized = Self(OMLX_E_UNAUTHORIZED)
    /// A server cannot be reached, or does not answer as it should.
    public static let network = Self(OMLX_E_NETWORK)
    /// The network would be needed, and offline mode forbids it.
    public static let offline = Self(OMLX_E_OFFLINE)
    /// The disk has too little room.
    public static let noSpace = Self(OMLX_E_NO_SPACE)
    /// What was downloaded is not what was announced.
    public static let checksum = Self(OMLX_E_CHECKSUM)
}

extension OMLXError.Code: CustomStringConvertible {
    /// Its name in C, such as "OMLX_E_NOT_FOUND".
    public var description: String { text(omlx_status_name(rawValue)) }
}

extension OMLXError: CustomStringConvertible, LocalizedError {
    public var description: String { "\(code): \(message)" }
    public var errorDescription: String? { message }
}

/// Runs a C function whose last parameter is an error output, and throws what it reports.
func check(_ call: (UnsafeMutablePointer<OpaquePointer?>) throws -> Int32) throws {
    var details: OpaquePointer?
    let status = try call(&details)
    guard status != success else { return }
    defer { omlx_error_release(details) }
    let code = OMLXError.Code(rawValue: status)
    let message = text(omlx_error_message(details))
    let retry = omlx_error_retry_after_ms(details)
    throw OMLXError(
        code, message.isEmpty ? code.description : message,
        retryAfter: retry > 0 ? .milliseconds(Int64(clamping: retry)) : nil)
}

/// `OMLX_OK` as functions return it.
let success = Int32(bitPattern: OMLX_OK.rawValue)
