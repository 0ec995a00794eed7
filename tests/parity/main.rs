//! The same numbers as the reference implementations.

mod encoders;
mod minilm;
mod models;
mod quantized;
mod templates;
mod tiny_chat;
