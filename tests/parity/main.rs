//! The same numbers as the reference implementations.

mod models;
mod templates;
mod tiny_chat;
