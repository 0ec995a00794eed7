//! Engines seen from outside: what a host can do to them.

mod bad_models;
