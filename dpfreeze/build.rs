//! Compiles the BPF program and generates its skeleton into OUT_DIR.
//!
//! Needs clang (14 or later), libc6-dev, libelf-dev, zlib1g-dev, make and pkg-config (libbpf itself is vendored by
//! libbpf-sys). A static binary needs nothing more, because the two -dev packages hold the archives:
//! `RUSTFLAGS='-C target-feature=+crt-static' cargo build --target x86_64-unknown-linux-gnu`.

use std::path::PathBuf;
use std::{env, io};

use libbpf_cargo::SkeletonBuilder;

const SOURCE: &str = "bpf/freeze.bpf.c";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={SOURCE}");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("freeze.skel.rs");
    SkeletonBuilder::new().source(SOURCE).clang_args(clang_args()?).build_and_generate(out).map_err(|error| {
        // The alternate form carries clang's own messages.
        io::Error::other(format!("{SOURCE}: {error:#}; needs clang 14 or later and the libc headers (libc6-dev)"))
    })?;
    Ok(())
}

/// `asm/types.h` lies in the multiarch folder of the *build* machine, which clang leaves out for `-target bpf`.
fn clang_args() -> Result<Vec<String>, env::VarError> {
    let mut args = vec!["-Wall".to_owned()];
    let host = env::var("HOST")?;
    let arch = host.split('-').next().unwrap_or_default();
    for triplet in [format!("{arch}-linux-gnu"), host.clone()] {
        let dir = format!("/usr/include/{triplet}");
        if std::path::Path::new(&dir).is_dir() {
            args.push(format!("-I{dir}"));
            break;
        }
    }
    Ok(args)
}
