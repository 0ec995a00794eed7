import COMLX

extension Model {
    /// Token ids of a text; with special tokens, those that the tokenizer puts around it, too. Loads no weights.
    public func tokenize(_ text: String, addSpecialTokens: Bool = false) async throws -> [UInt32] {
        let (handle, id) = (pool.handle, id)
        return try await blocking {
            var tokens: OpaquePointer?
            try withOptionalCString(id) { id in
                try withBytes(of: text) { bytes, count in
                    try check { omlx_tokenize(handle.pointer, id, bytes, count, addSpecialTokens ? 1 : 0, &tokens, $0) }
                }
            }
            defer { omlx_tokens_release(tokens) }
            return copy(omlx_tokens_data(tokens), count: omlx_tokens_count(tokens))
        }
    }

    /// Text of token ids, special tokens included.
    public func detokenize(_ tokens: [UInt32]) async throws -> String {
        let (handle, id) = (pool.handle, id)
        return try await blocking {
            var string: OpaquePointer?
            try withOptionalCString(id) { id in
                try tokens.withUnsafeBufferPointer { tokens in
                    try check { omlx_detokenize(handle.pointer, id, tokens.baseAddress, tokens.count, &string, $0) }
                }
            }
            return take(string)
        }
    }

    /// The prompt that the chat template makes of a request.
    public func render(_ request: ChatRequest) async throws -> String {
        var request = request
        request.model = id
        let (handle, json) = (pool.handle, request.json)
        return try await blocking {
            var string: OpaquePointer?
            try withBytes(of: json) { bytes, count in
                try check { omlx_render_template(handle.pointer, bytes, count, 0, &string, $0) }
            }
            return take(string)
        }
    }
}
