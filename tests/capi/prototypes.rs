//! Reads the function prototypes out of `include/omlx.h`, for the tests that must cover every function.

/// A function of the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prototype {
    /// What it returns, in C.
    pub returns: String,
    /// Its name.
    pub name: String,
    /// Types and names of its parameters.
    pub parameters: Vec<Parameter>,
}

/// A parameter of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Type in C, such as `const omlx_event **`.
    pub kind: String,
    /// Name.
    pub name: String,
}

impl Parameter {
    /// Whether NULL can be passed.
    pub fn is_pointer(&self) -> bool {
        self.kind.ends_with('*') || self.is_function()
    }

    /// Whether it is a pointer to a function.
    pub fn is_function(&self) -> bool {
        self.kind.ends_with("_fn")
    }
}

/// The committed header. Read when the tests run, for the test that may just have written it anew.
pub fn header() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/include/omlx.h");
    std::fs::read_to_string(path).expect("include/omlx.h")
}

/// All functions that `header` declares, in its order.
pub fn parse(header: &str) -> Vec<Prototype> {
    let code: Vec<_> = header.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let code = code.join("\n");
    let mut prototypes = Vec::new();
    for statement in code.split(';') {
        // A struct's first field follows its brace, a prototype the end of whatever preceded it.
        let text = statement.rsplit(['}', '{', '#']).next().unwrap_or_default();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if text.starts_with("typedef ") || !text.ends_with(')') {
            continue;
        }
        let Some((head, parameters)) = text.split_once('(') else { continue };
        let Some(start) = head.rfind(['*', ' ']).filter(|at| head[at + 1..].starts_with("omlx_")) else { continue };
        prototypes.push(Prototype {
            returns: last_type(head[..=start].trim()),
            name: head[start + 1..].to_owned(),
            parameters: parameters.trim_end_matches(')').split(", ").filter(|p| *p != "void").map(parameter).collect(),
        });
    }
    prototypes
}

/// The return type without what a preprocessor line may have left in front of it.
fn last_type(text: &str) -> String {
    let known = ["const char *", "const uint32_t *", "omlx_status", "uint32_t", "uint64_t", "size_t", "void"];
    let found = known.iter().find(|known| text.ends_with(*known));
    (*found.unwrap_or_else(|| panic!("a return type that this reader does not know: {text:?}"))).to_owned()
}

fn parameter(text: &str) -> Parameter {
    let at = text.rfind(['*', ' ']).unwrap_or_else(|| panic!("not a parameter: {text:?}"));
    Parameter { kind: text[..=at].trim().to_owned(), name: text[at + 1..].to_owned() }
}

#[test]
fn prototypes_are_read() {
    let header = "/// Doc; text (with brackets).\nconst char *omlx_a(void);\n#define X 1\nomlx_status omlx_b(omlx_pool *pool, \
                  size_t n,\n    omlx_event_fn f,\n    omlx_error **error);\ntypedef void (*omlx_fn)(void *user_data);\n\
                  typedef struct omlx_s {\n    uint32_t x;\n} omlx_s;\n";
    let read = parse(header);
    let names: Vec<_> = read.iter().map(|p| (p.returns.as_str(), p.name.as_str(), p.parameters.len())).collect();
    assert_eq!(names, [("const char *", "omlx_a", 0), ("omlx_status", "omlx_b", 4)]);
    let kinds: Vec<_> = read[1].parameters.iter().map(|p| (p.kind.as_str(), p.is_pointer())).collect();
    assert_eq!(kinds, [("omlx_pool *", true), ("size_t", false), ("omlx_event_fn", true), ("omlx_error **", true)]);
    // Every line that looks like the start of a prototype was read.
    let header = self::header();
    let starts = header.lines().filter(|l| !l.starts_with([' ', '/', '#', 't', 'O', '}']) && l.contains('('));
    assert_eq!(parse(&header).len(), starts.count());
}
