//! The OpenAPI document and the page.

use serde_json::Value;

use crate::harness::Server;

#[test]
fn the_document_has_every_route_and_no_other() {
    let server = Server::start(&[]);
    let document: Value = server.get("/openapi.json").expect(200);
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    for (path, operations) in document["paths"].as_object().unwrap() {
        let concrete = path.replace("{id}", "nothing");
        for method in operations.as_object().unwrap().keys() {
            let body = if matches!(method.as_str(), "get" | "delete") { "" } else { "{" };
            let status = server.call(&method.to_uppercase(), &concrete, &[], body).status;
            assert_ne!(status, 405, "{method} {path}");
            // A thing that is not there is; a path is not.
            let unrouted = status == 404 && !path.contains("{id}");
            assert!(!unrouted, "{method} {path} is documented, but not there");
        }
    }
    // What the source routes is documented.
    let sources = [include_str!("../../src/routes/mod.rs"), include_str!("../../src/routes/admin/mod.rs")];
    for (source, prefix) in sources.iter().zip(["", "/admin/api"]) {
        for route in source.split(".route(\"").skip(1).filter_map(|rest| rest.split('"').next()) {
            let path = format!("{prefix}{}", route.replace("{*id}", "{id}"));
            assert!(document["paths"].get(&path).is_some(), "{path} is not in the document");
        }
    }
}

#[test]
fn the_page_needs_nothing_from_elsewhere() {
    let server = Server::start(&[]);
    let reply = server.get("/");
    assert_eq!(reply.status, 200);
    assert!(reply.header("content-security-policy").unwrap().contains("default-src 'none'"));
    for foreign in ["http://", "https://", "src=\"/", "@import", "<link"] {
        assert!(!reply.body.contains(foreign), "the page mentions {foreign}");
    }
    for word in ["<script>", "prefers-color-scheme", "viewport"] {
        assert!(reply.body.contains(word), "the page has no {word}");
    }
}
