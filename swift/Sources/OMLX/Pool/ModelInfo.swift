/// What a pool knows of a model.
public struct ModelInfo: Sendable, Hashable, Codable, Identifiable {
    /// Names it in requests.
    public let id: String
    /// Another name for it.
    public let alias: String?
    public let isLoaded: Bool
    /// Bytes of the weight files.
    public let fileBytes: UInt64
    /// Its path.
    public let folder: String?
    public let kind: ModelKind?
    /// The architecture.
    public let modelType: String?
    public let contextLength: Int?
    public let quantization: Quantization?
    /// As its README.md names it.
    public let license: String?
    /// Path of the file with its text.
    public let licenseFile: String?
    /// Why it cannot be used.
    public let problem: String?
    /// The class of that, such as "OMLX_E_UNSUPPORTED".
    public let problemStatus: String?
    /// Of a loaded one: "cpu" or "gpu".
    public let device: String?
    public let weightBytes: UInt64?
    public let loadSeconds: Double?

    /// Format of most weights.
    public struct Quantization: Sendable, Hashable, Codable {
        public let bits: Int
        public let groupSize: Int
        /// Such as "affine" or "mxfp4".
        public let mode: String

        private enum CodingKeys: String, CodingKey {
            case bits, mode
            case groupSize = "group_size"
        }
    }

    private enum CodingKeys: String, CodingKey {
        case id, alias, folder, kind, quantization, license, problem, device
        case isLoaded = "loaded"
        case fileBytes = "file_bytes"
        case modelType = "model_type"
        case contextLength = "context_length"
        case licenseFile = "license_file"
        case problemStatus = "problem_status"
        case weightBytes = "weight_bytes"
        case loadSeconds = "load_seconds"
    }
}

/// What a model is for. Open: newer libraries may know more.
public struct ModelKind: RawRepresentable, Sendable, Hashable, Codable {
    /// Its name in the library.
    public let rawValue: String

    /// The kind of that name.
    public init(rawValue: String) {
        self.rawValue = rawValue
    }

    public static let languageModel = Self(rawValue: "llm")
    public static let embedding = Self(rawValue: "embedding")
    public static let reranker = Self(rawValue: "reranker")
    /// Listed, but not supported.
    public static let vision = Self(rawValue: "vision")
}
