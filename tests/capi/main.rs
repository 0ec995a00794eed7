//! The C ABI as C hosts meet it: the header in every dialect, programs compiled by the system's compilers against the
//! shared library that was built with these tests, and the promises that the header makes.

mod abi;
mod bundled;
mod cc;
mod cpp;
mod dialects;
mod examples;
mod header;
mod host;
mod latency;
mod layout;
mod lifecycle;
mod null;
mod prototypes;
mod symbols;
mod versions;
