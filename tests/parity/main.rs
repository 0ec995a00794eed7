//! The same numbers as the reference implementations.

mod encoders;
mod gemma4;
mod minilm;
mod models;
mod predicts_ahead;
mod quantized;
mod templates;
mod tiny_chat;
