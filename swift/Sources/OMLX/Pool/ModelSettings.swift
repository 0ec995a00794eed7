/// What is settled about a model; `nil` is the default.
public struct ModelSettings: Sendable, Hashable, Codable {
    /// Another name for it in requests.
    public var alias: String?
    /// It is not unloaded to make room, nor when its time is up.
    public var isPinned = false
    /// It is loaded now, and when a pool with these settings is opened.
    public var preload = false
    /// Seconds after which it is unloaded if it has no requests; below 0: only when its memory is needed.
    public var timeToLiveSeconds: Double?
    /// Tokens of a prompt and its answer at most.
    public var contextLength: Int?
    /// What it is used for, where its folder tells something else.
    public var kind: ModelKind?
    /// For requests that do not say: keys of a request, such as "temperature".
    public var defaults: JSONObject = [:]

    /// Nothing settled.
    public init() {}

    private enum CodingKeys: String, CodingKey {
        case alias, preload, kind, defaults
        case isPinned = "pinned"
        case timeToLiveSeconds = "ttl_seconds"
        case contextLength = "context_length"
    }

    public init(from decoder: any Decoder) throws {
        let container = try decoder.container(keyedBy: CodingKeys.self)
        alias = try container.decodeIfPresent(String.self, forKey: .alias)
        isPinned = try container.decodeIfPresent(Bool.self, forKey: .isPinned) ?? false
        preload = try container.decodeIfPresent(Bool.self, forKey: .preload) ?? false
        timeToLiveSeconds = try container.decodeIfPresent(Double.self, forKey: .timeToLiveSeconds)
        contextLength = try container.decodeIfPresent(Int.self, forKey: .contextLength)
        kind = try container.decodeIfPresent(ModelKind.self, forKey: .kind)
        defaults = try container.decodeIfPresent(JSONObject.self, forKey: .defaults) ?? [:]
    }

    /// The change that makes a model's settings these: a key with null is taken back. `earlier` are the defaults that were
    /// settled, of which those that are not here any more have to go one by one.
    func patch(forgetting earlier: JSONObject) -> String {
        var defaults = defaults
        for key in earlier.keys where defaults[key] == nil { defaults[key] = .null }
        let object: JSONValue = [
            CodingKeys.alias.rawValue: alias.map { .string($0) } ?? .null,
            CodingKeys.isPinned.rawValue: .bool(isPinned),
            CodingKeys.preload.rawValue: .bool(preload),
            CodingKeys.timeToLiveSeconds.rawValue: timeToLiveSeconds.map { .number($0) } ?? .null,
            CodingKeys.contextLength.rawValue: contextLength.map { .integer(Int64($0)) } ?? .null,
            CodingKeys.kind.rawValue: kind.map { .string($0.rawValue) } ?? .null,
            CodingKeys.defaults.rawValue: .object(defaults),
        ]
        return object.json
    }
}
