//! The server as clients meet it: the program, started on a port of its own with the bundled model, over plain sockets.

mod admin;
mod agents;
mod anthropic;
mod cli;
mod document;
mod encoders;
mod guard;
mod harness;
mod hostile;
mod hub;
mod life;
mod openai;
