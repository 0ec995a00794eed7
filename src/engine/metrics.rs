//! What an engine tells about itself. Pure.

use serde::Serialize;

use super::scheduler::Counters;
use crate::cache::blocks::BlockCounts;

/// Counters since the engine started, and how things stand now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct EngineMetrics {
    /// Requests that are accepted and do not run yet.
    pub queued_requests: usize,
    /// Sequences that wait for a place among the running ones.
    pub waiting_sequences: usize,
    /// Sequences that take part in steps.
    pub running_sequences: usize,
    /// Steps computed.
    pub steps: u64,
    /// Those in which prompts passed some of the layers only, so that answers beside them stay smooth.
    pub partial_steps: u64,
    /// Those in which a part of a prompt and answers were computed at the same time.
    pub parallel_steps: u64,
    /// Seconds that steps took.
    pub step_seconds: f64,
    /// Seconds since the step that is being computed, or told of, began or the one before it ended; 0 while none is.
    pub step_age_seconds: f64,
    /// Seconds in which the host planned steps, and turned tokens into text and events.
    pub host_seconds: f64,
    /// Seconds in which the host described steps to MLX.
    pub build_seconds: f64,
    /// Seconds in which MLX's host side encoded them for the device.
    pub encode_seconds: f64,
    /// Seconds in which the host waited for the device.
    pub wait_seconds: f64,
    /// Prompt tokens computed.
    pub prompt_tokens: u64,
    /// Prompt tokens found in the cache.
    pub cached_tokens: u64,
    /// Tokens sampled.
    pub completion_tokens: u64,
    /// Texts encoded.
    pub texts: u64,
    /// Sequences that gave their blocks to others for a while.
    pub preemptions: u64,
    /// Cached whole blocks, and ends of prompts and answers.
    pub cache_entries: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Bytes of a block in the layers of every cache group.
    pub block_bytes: usize,
    /// Blocks of all groups that sequences and pins hold.
    pub blocks_used: usize,
    /// Blocks that are kept for what they hold.
    pub blocks_cached: usize,
    /// Empty blocks.
    pub blocks_free: usize,
    /// Blocks that there may be at most.
    pub blocks_limit: usize,
    /// Bytes of the weights.
    pub weight_bytes: usize,
    /// Bytes of the pools.
    pub cache_bytes: usize,
    /// Bytes of the blocks that sequences and pins hold.
    pub used_bytes: usize,
    /// Bytes of the blocks that are kept for what they hold.
    pub cached_bytes: usize,
    /// Bytes of empty blocks.
    pub free_bytes: usize,
    /// Bytes that steps may take besides, as was reckoned.
    pub workspace_bytes: usize,
}

impl EngineMetrics {
    /// Takes over what the scheduler counted, and the blocks of each group.
    pub(super) fn count(&mut self, counters: Counters, blocks: &[BlockCounts], block_bytes: &[usize]) {
        self.waiting_sequences = counters.waiting;
        self.running_sequences = counters.running;
        self.prompt_tokens = counters.prompt_tokens;
        self.cached_tokens = counters.cached_tokens;
        self.completion_tokens = counters.completion_tokens;
        self.partial_steps = counters.partial_steps;
        self.preemptions = counters.preemptions;
        let sum = |state: fn(&BlockCounts) -> usize| {
            let bytes = blocks.iter().zip(block_bytes).map(|(counts, bytes)| state(counts) * bytes).sum();
            (blocks.iter().map(state).sum(), bytes)
        };
        (self.blocks_used, self.used_bytes) = sum(|counts| counts.used);
        (self.blocks_cached, self.cached_bytes) = sum(|counts| counts.cached);
        (self.blocks_free, self.free_bytes) = sum(|counts| counts.free);
    }
}
