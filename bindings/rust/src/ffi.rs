//! The C functions, as the header declares them: made from it when this crate is built.

#![allow(missing_docs, non_camel_case_types, dead_code)]

// Holds the functions; nothing else of it is used.
extern crate omlx as _;

include!(concat!(env!("OUT_DIR"), "/omlx.rs"));
