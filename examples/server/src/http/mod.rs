//! What all endpoints share: bodies, errors, streams, answers, and what guards them.

pub mod answer;
pub mod anthropic;
pub mod body;
pub mod error;
pub mod guard;
pub mod keys;
pub mod listen;
pub mod openai;
pub mod reader;
pub mod responses_input;
pub mod sse;
