//! Catching panics: they become errors, with the place they came from, and nothing is printed.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::error::{Error, Result};

thread_local! {
    /// How many [`catch`] are on this thread's stack.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// Where the panic that is being caught came from.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `body`; a panic is an error of status `Internal`. What `body` leaves behind is for the caller to judge.
pub fn catch<T>(body: impl FnOnce() -> T) -> Result<T> {
    silence();
    DEPTH.set(DEPTH.get() + 1);
    let outcome = catch_unwind(AssertUnwindSafe(body));
    DEPTH.set(DEPTH.get() - 1);
    outcome.map_err(|payload| describe(&*payload))
}

fn describe(payload: &(dyn Any + Send)) -> Error {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown");
    let place = PLACE.take().map(|place| format!(" at {place}")).unwrap_or_default();
    Error::internal(format!("panic{place}: {text}"))
}

/// Wraps the process's panic hook, which would print: panics that are about to be caught here only leave their place.
/// All others go to the hook that was there.
fn silence() {
    static WRAPPED: Once = Once::new();
    WRAPPED.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // The threads of kernels hand their panics on to a thread that catches them.
            let in_kernel = std::thread::current().name().is_some_and(|name| name.starts_with("omlx-cpu"));
            if DEPTH.get() == 0 && !in_kernel {
                return others(info);
            }
            let place = info.location().map(|at| format!("{}:{}", at.file(), at.line()));
            PLACE.with(|slot| *slot.borrow_mut() = place);
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn a_panic_is_an_error_with_its_place() {
        let error = catch(|| -> u8 { panic!("lost {}", "it") }).unwrap_err();
        assert_eq!(error.status(), Status::Internal);
        assert!(error.message().contains("panics.rs") && error.message().ends_with("lost it"), "{error}");
        assert_eq!(catch(|| 7).unwrap(), 7);
        // Outside of `catch` the place is not taken over from an earlier panic.
        let nested = catch(|| catch(|| panic!("inner")).unwrap_err()).unwrap();
        assert!(nested.message().ends_with("inner"));
    }
}
