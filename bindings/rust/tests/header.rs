//! The reader of the header: what it makes of C, and that it refuses what it does not know.

#[path = "../build/header.rs"]
mod header;

const SAMPLE: &str = "
#define OMLX_ABI_VERSION 7
#define LONG \\
    continued;
/// Text; with (brackets) {
OMLX_ENUM(omlx_kind, uint32_t) {
    /// One.
    OMLX_KIND_ONE = 1,
    OMLX_KIND_TWO = 2,
};
typedef struct omlx_thing omlx_thing;
typedef struct omlx_item {
    uint32_t size;
    const struct omlx_item *next;
    const char *text;
} omlx_item;
typedef int32_t (*omlx_fn)(void *user_data, const omlx_item *item);
const char *omlx_name(void);
omlx_status omlx_get(
    omlx_thing *thing,
    const omlx_item **item,
    double share,
    omlx_fn callback);
void omlx_free(omlx_thing *thing);
";

#[test]
fn declarations_become_rust() {
    let rust = header::to_rust(SAMPLE).unwrap();
    for line in [
        "pub type omlx_kind = u32;",
        "pub const OMLX_KIND_TWO: omlx_kind = 2;",
        "pub struct omlx_thing { opaque: [u8; 0] }",
        "pub next: *const omlx_item,",
        "pub text: *const c_char,",
        "pub type omlx_fn = Option<unsafe extern \"C\" fn(user_data: *mut c_void, item: *const omlx_item) -> i32>;",
        "pub fn omlx_name() -> *const c_char;",
        "pub fn omlx_get(thing: *mut omlx_thing, item: *mut *const omlx_item, share: f64, callback: omlx_fn) -> omlx_status;",
        "pub fn omlx_free(thing: *mut omlx_thing);",
        "pub const OMLX_ABI_VERSION: u32 = 7;",
    ] {
        assert!(rust.contains(line), "{line}\n{rust}");
    }
}

#[test]
fn what_is_not_known_is_refused() {
    for bad in [
        "long omlx_x(void);",
        "void omlx_x(int n);",
        "typedef struct omlx_s { char text[8]; } omlx_s;",
        "OMLX_ENUM(omlx_e, uint16_t) { OMLX_E_A = 1, };",
        "OMLX_ENUM(omlx_e, uint32_t) { OMLX_E_A, };",
        "static;",
    ] {
        assert!(header::to_rust(&format!("#define OMLX_ABI_VERSION 1\n{bad}\n")).is_err(), "{bad}");
    }
    assert!(header::to_rust("void omlx_x(void);").is_err(), "a version is missing");
}
