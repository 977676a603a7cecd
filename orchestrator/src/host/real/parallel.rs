//! Work on many bridges at a time, within bounds: a process or a connection for each of hundreds of bridges at once would
//! need as many descriptors and as much memory, and be no quicker: one daemon answers all of them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::host::{HostError, Result};

/// So many are under way at a time.
const MOST_AT_ONCE: usize = 16;
/// The stack of a thread, bytes. The supervisor's memory is locked, so that all of a stack is there from its beginning.
pub(super) const STACK: usize = 512 << 10;

/// Runs `work` on every item, [`MOST_AT_ONCE`] at a time; the first error in the order of the items counts.
pub(super) fn side_by_side<I: Sync, O: Send>(items: &[I], work: impl Fn(&I) -> Result<O> + Sync) -> Result<Vec<O>> {
    let next = AtomicUsize::new(0);
    let done: Vec<Mutex<Option<Result<O>>>> = items.iter().map(|_| Mutex::new(None)).collect();
    let worker = || {
        while let Some((item, done)) = nth(items, &done, next.fetch_add(1, Ordering::Relaxed)) {
            let result = work(item);
            *done.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..items.len().min(MOST_AT_ONCE) {
            // Where no thread can be had, those that are there do its work.
            let started = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, worker);
            if let Err(error) = started {
                tracing::warn!("starting a thread for OpenFlow: {error}");
                break;
            }
        }
        worker();
    });
    let unfinished = || Err(HostError::new("ovs-ofctl", "a thread of ours panicked"));
    done.into_iter()
        .map(|one| one.into_inner().unwrap_or_else(PoisonError::into_inner).unwrap_or_else(unfinished))
        .collect()
}

fn nth<'a, I, D>(items: &'a [I], done: &'a [D], n: usize) -> Option<(&'a I, &'a D)> {
    Some((items.get(n)?, done.get(n)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn all_items_are_worked_on_and_errors_come_out() {
        assert_eq!(side_by_side(&[1, 2, 3], |n| Ok(n * 2)).unwrap(), [2, 4, 6]);
        let error = side_by_side(&[1, 2], |n| if *n == 2 { Err(HostError::new("x", "y")) } else { Ok(()) });
        assert_eq!(error.unwrap_err().object, "x");
        assert!(side_by_side(&[], |_: &u8| Ok(())).unwrap().is_empty());
    }

    #[test]
    fn many_items_are_not_worked_on_all_at_once() {
        let items: Vec<usize> = (0..250).collect();
        let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let results = side_by_side(&items, |n| {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
            now.fetch_sub(1, Ordering::SeqCst);
            Ok(*n)
        });
        assert_eq!(results.unwrap(), items);
        assert!((2..=MOST_AT_ONCE).contains(&most.load(Ordering::SeqCst)), "{most:?}");
    }
}
