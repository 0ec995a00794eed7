//! An encrypted hub. Its certificate, for this machine alone, is in `tls/`; the key that signed it is gone.

use serde_json::json;

use crate::server::{Hub, small};
use crate::{Case, child, content, model};

const AUTHORITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/hub/tls/ca.pem");

#[test]
fn certificates_decide_whom_we_trust() {
    let files = [small("config.json", "{}")];
    let case = Case::of(Hub::encrypted(), &files);
    let download = |variables: &[(&str, &str)]| child::outcome(&case, child::start(&case, &[json!({})], variables));
    let unknown = download(&[]);
    assert!(unknown.starts_with("Network") && unknown.contains("certificate"), "{unknown}");
    assert!(case.hub.seen().is_empty(), "nothing is said to a stranger");
    let missing = download(&[("SSL_CERT_FILE", "/no/such/file")]);
    assert!(missing.starts_with("NotFound") && missing.contains("SSL_CERT_FILE"), "{missing}");
    assert_eq!(download(&[("SSL_CERT_FILE", AUTHORITY)]), "arrived");
    assert_eq!(content(&case.model())["config.json"], b"{}");
}

#[test]
fn an_encrypted_hub_does_not_send_us_into_the_open() {
    let case = Case::of(Hub::encrypted(), &model());
    let variables = [("SSL_CERT_FILE", AUTHORITY)];
    let outcome = child::outcome(&case, child::start(&case, &[json!({})], &variables));
    assert!(outcome.starts_with("Network") && outcome.contains("not encrypted"), "{outcome}");
    assert!(!case.hub.seen().iter().any(|seen| seen.network) && !case.model().exists());
}
