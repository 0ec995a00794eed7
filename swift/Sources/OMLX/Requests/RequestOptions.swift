/// How a request is delivered, of whatever kind it is.
public struct RequestOptions: Sendable, Hashable {
    /// Keys that the library does not know are ignored instead of refused.
    public var ignoresUnknownKeys: Bool
    /// A generation begins with `GenerationEvent.loading` while its model is being loaded.
    public var reportsLoading: Bool
    /// A generation tells of `GenerationEvent.started` before its first text.
    public var reportsStart: Bool

    /// All defaults: strict, and silent about loading and the start.
    public init(ignoresUnknownKeys: Bool = false, reportsLoading: Bool = false, reportsStart: Bool = false) {
        self.ignoresUnknownKeys = ignoresUnknownKeys
        self.reportsLoading = reportsLoading
        self.reportsStart = reportsStart
    }
}
