/// How a request is delivered, of whatever kind it is.
public struct RequestOptions: Sendable, Hashable {
    /// Keys that the library does not know are ignored instead of refused.
    public var ignoresUnknownKeys: Bool
    /// A generation begins with `GenerationEvent.loading` while its model is being loaded.
    public var reportsLoading: Bool

    /// All defaults: strict, and silent about loading.
    public init(ignoresUnknownKeys: Bool = false, reportsLoading: Bool = false) {
        self.ignoresUnknownKeys = ignoresUnknownKeys
        self.reportsLoading = reportsLoading
    }
}
