//! Engines of embedding models and rerankers: texts of all requests share batches.
//!
//! ```text
//! submit ─▶ intake: tokenise, check ─▶ worker: next batch / compute / commit ─▶ one event with the result
//! ```

mod jobs;
mod output;
mod request;
pub(super) mod text;
pub(super) mod worker;

pub use request::{EncodeRequest, EncodeTask, TextOrTokens};
