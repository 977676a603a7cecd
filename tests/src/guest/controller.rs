//! An OpenFlow 1.3 controller of our own: it greets, lives, and sends what it is asked about on its way, or only counts.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use anyhow::{Context, Result};

/// OpenFlow 1.3.
const VERSION: u8 = 4;
// Types of messages (ofp_type of OpenFlow 1.3, 7.1).
const HELLO: u8 = 0;
const ECHO_REQUEST: u8 = 2;
const ECHO_REPLY: u8 = 3;
const PACKET_IN: u8 = 10;
const PACKET_OUT: u8 = 13;
/// Of a message's header.
const HEADER: usize = 8;
/// OXM of the ingress port: class of OpenFlow's basic fields, field 0, four bytes.
const OXM_IN_PORT: [u8; 4] = [0x80, 0, 0, 4];
const NO_BUFFER: [u8; 4] = [0xff; 4];
/// OFPP_NORMAL.
const NORMAL: [u8; 4] = 0xffff_fffa_u32.to_be_bytes();

/// A controller that listens.
#[derive(Debug, Clone, Default)]
pub struct Controller {
    packets: Arc<AtomicU64>,
    only_counts: bool,
}

impl Controller {
    /// Listens on `port` of the host, until the guest ends; what it is asked about goes on as NORMAL would send it.
    pub fn start(port: u16) -> Result<Controller> {
        Controller::default().listen(port)
    }

    /// The same, and takes what it gets for copies.
    pub fn counting(port: u16) -> Result<Controller> {
        Controller { only_counts: true, ..Controller::default() }.listen(port)
    }

    fn listen(self, port: u16) -> Result<Controller> {
        let listener = TcpListener::bind(("127.0.0.1", port))
            .with_context(|| format!("the controller cannot listen on {port}"))?;
        let shared = self.clone();
        std::thread::spawn(move || {
            for switch in listener.incoming().flatten() {
                let controller = shared.clone();
                std::thread::spawn(move || controller.serve(switch));
            }
        });
        Ok(self)
    }

    /// Packets that it was asked about.
    pub fn packets(&self) -> u64 {
        self.packets.load(Ordering::Relaxed)
    }

    /// Until the switch hangs up.
    fn serve(&self, mut switch: TcpStream) -> std::io::Result<()> {
        switch.set_nodelay(true)?;
        switch.write_all(&message(HELLO, [0; 4], &[]))?;
        loop {
            let mut header = [0; HEADER];
            switch.read_exact(&mut header)?;
            let [_, kind, high, low, id @ ..] = header;
            let length = usize::from(u16::from_be_bytes([high, low]));
            let mut body = vec![0; length.checked_sub(HEADER).ok_or(ErrorKind::InvalidData)?];
            switch.read_exact(&mut body)?;
            match kind {
                ECHO_REQUEST => switch.write_all(&message(ECHO_REPLY, id, &body))?,
                PACKET_IN => {
                    self.packets.fetch_add(1, Ordering::Relaxed);
                    if let Some(body) = packet_out(&body).filter(|_| !self.only_counts) {
                        switch.write_all(&message(PACKET_OUT, id, &body))?;
                    }
                }
                _ => {}
            }
        }
    }
}

fn message(kind: u8, id: [u8; 4], body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(HEADER + body.len()).unwrap_or(u16::MAX).to_be_bytes();
    [&[VERSION, kind], &length[..], &id, body].concat()
}

/// The answer to a packet-in: the packet goes on as NORMAL would send it.
fn packet_out(packet_in: &[u8]) -> Option<Vec<u8>> {
    // buffer_id, total_len, reason, table_id, cookie; then the match: type, length, fields, padding; two bytes; data.
    let match_length = usize::from(u16::from_be_bytes(packet_in.get(18..20)?.try_into().ok()?));
    let fields = packet_in.get(20..16 + match_length)?;
    let in_port = fields.strip_prefix(&OXM_IN_PORT[..])?.get(..4)?;
    let data = packet_in.get(16 + match_length.next_multiple_of(8) + 2..)?;
    let output = [&[0, 0, 0, 16], &NORMAL[..], &[0; 8]].concat();
    Some([&NO_BUFFER[..], in_port, &[0, 16], &[0; 6], &output, data].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_goes_on_from_where_it_came() {
        let fixed = [&NO_BUFFER[..], &[0, 3, 0, 0], &[0; 8]].concat();
        // One field of eight bytes, padded to sixteen.
        let matched = [&[0, 1, 0, 12], &OXM_IN_PORT[..], &[0, 0, 0, 7], &[0; 4]].concat();
        let packet_in = [&fixed[..], &matched, &[0, 0], b"abc"].concat();
        assert_eq!(packet_in.len(), 16 + 16 + 2 + 3);
        let out = packet_out(&packet_in).unwrap();
        assert_eq!(out[..4], NO_BUFFER);
        assert_eq!(out[4..8], [0, 0, 0, 7]);
        assert_eq!(out[8..10], [0, 16]);
        assert_eq!(out[16..24], [0, 0, 0, 16, 0xff, 0xff, 0xff, 0xfa]);
        assert_eq!(out[32..], *b"abc");
        assert_eq!(packet_out(&packet_in[..20]), None);
        let whole = message(PACKET_OUT, [0, 0, 0, 9], &out);
        assert_eq!(whole[..8], [4, 13, 0, 43, 0, 0, 0, 9]);
    }
}
