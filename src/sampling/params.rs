//! How one sequence samples. Pure.

/// How one sequence samples. All values are validated by whoever builds this.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Softmax temperature; 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps the most likely tokens until their mass reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps tokens with at least this share of the best token's probability; 0 keeps all.
    pub min_p: f32,
    /// Same seed, same draws.
    pub seed: u64,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the answer (Keskar et al. 2019).
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the answer.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the answer.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Report log-probabilities: of the drawn token and of this many most likely ones.
    pub top_logprobs: Option<usize>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            top_logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Whether the best token is taken: below this temperature the tempered logits would overflow.
    pub(super) fn is_greedy(&self) -> bool {
        self.temperature < 1e-5
    }

    /// Whether drawing needs the tokens in order.
    pub(super) fn sorts(&self) -> bool {
        !self.is_greedy() && (self.top_p < 1.0 || self.top_k > 0)
    }

    /// Whether the tokens of the answer are counted.
    pub(super) fn counts_answer(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}
