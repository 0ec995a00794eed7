//! The same numbers as the reference implementations.

mod encoders;
mod gemma4;
mod minilm;
mod models;
mod quantized;
mod templates;
mod tiny_chat;
