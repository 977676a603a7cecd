//! The memory of other processes.

use std::io;
use std::ptr;

/// Reads `length` bytes at `address` of the thread's process, or as many of them as can be read: process_vm_readv(2).
pub(crate) fn read(thread: libc::pid_t, address: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0u8; length];
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: length };
    let remote = libc::iovec { iov_base: ptr::without_provenance_mut(address as usize), iov_len: length };
    // SAFETY: `local` describes `bytes`, which outlives the call; `remote` is in the other process, and the kernel checks it.
    let count = unsafe { libc::process_vm_readv(thread, &local, 1, &remote, 1, 0) };
    bytes.truncate(usize::try_from(count).map_err(|_| io::Error::last_os_error())?);
    Ok(bytes)
}
