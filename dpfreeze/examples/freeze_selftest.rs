//! Proves the freeze on a running kernel; for a throw-away VM, as root, with the openvswitch module loaded.
use std::process::ExitCode;
fn main() -> ExitCode {
    use dpfreeze::freeze::*;
    if std::env::args().nth(1).as_deref() == Some("canary") {
        return canary_main();
    }
    println!("{:#?}", environment());
    let mut f = match Freeze::load() {
        Ok(f) => f,
        Err(e) => {
            println!("FAIL load {e}");
            return ExitCode::FAILURE;
        }
    };
    println!("{:?}", f.canary(&CanaryCommand::own(&["canary"]), Families::default()));
    println!("{:?}", f.state());
    println!("{:?}", f.thaw());
    println!("{:?}", state());
    ExitCode::SUCCESS
}
