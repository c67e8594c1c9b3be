"""A program at the other end of a bus: does what tests ask, with plain blocking sockets.

It shares no code with the agent, so that both cannot be wrong in the same way.

usage: bus_peer.py SOCKET NAME
"""

import os
import socket
import sys
from typing import Any

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageType
from dbus_next.message import Message

INTERFACE = "test.Peer"
PATH = "/peer"


class Peer:
    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.serial = 0
        self.held: list[Message] = []
        identity = str(os.getuid()).encode().hex()
        self.socket.sendall(f"\0AUTH EXTERNAL {identity}\r\n".encode())
        assert self.socket.recv(1024).startswith(b"OK")
        self.socket.sendall(b"NEGOTIATE_UNIX_FD\r\n")
        assert self.socket.recv(1024).startswith(b"AGREE")
        self.socket.sendall(b"BEGIN\r\n")
        self.call_bus("Hello")

    def send(self, message: Message) -> None:
        self.serial += 1
        message.serial = self.serial
        marshal: Any = message._marshall
        data = marshal(negotiate_unix_fd=True)
        sent = socket.send_fds(self.socket, [data], message.unix_fds or [])
        self.socket.sendall(data[sent:])
        for fd in message.unix_fds or []:
            os.close(fd)

    def receive(self) -> Message:
        unmarshaller: Any = Unmarshaller
        reader = unmarshaller(None, self.socket)
        message: Message | None = None
        while message is None:
            message = reader.unmarshall()
        return message

    def call_bus(self, member: str, signature: str = "", *body: Any) -> Message:
        bus = "org.freedesktop.DBus"
        call = Message(bus, "/", bus, member, signature=signature, body=list(body))
        self.send(call)
        while (answer := self.receive()).reply_serial != call.serial:
            pass
        return answer

    def answer(self, call: Message, signature: str = "", *body: Any, fds: Any = ()) -> None:
        self.send(Message.new_method_return(call, signature, list(body), list(fds)))

    def tick(self, number: int, path: str = PATH, destination: str = "") -> None:
        signal = Message.new_signal(path, INTERFACE, "Tick", "u", [number], [])
        signal.destination = destination
        self.send(signal)

    def serve(self) -> None:
        while True:
            message = self.receive()
            if message.message_type == MessageType.METHOD_CALL:
                getattr(self, f"on_{message.member.lower()}")(message)

    def on_echo(self, call: Message) -> None:
        """Return everything, descriptors included."""
        self.answer(call, call.signature, *call.body, fds=call.unix_fds)

    def on_caller(self, call: Message) -> None:
        """Return the caller's unique name."""
        self.answer(call, "s", call.sender)

    def on_fail(self, call: Message) -> None:
        """Answer with the error of the given name and text, or no text but the descriptors."""
        name, text = call.body if call.signature == "ss" else (call.body[0], "")
        error = Message.new_error(call, name, text)
        if not text:
            error.signature, error.body, error.unix_fds = "", [], call.unix_fds
        self.send(error)

    def on_never(self, call: Message) -> None:
        """Answer nothing."""

    def on_hold(self, call: Message) -> None:
        """Answer nothing until Release is called."""
        self.held.append(call)

    def on_release(self, call: Message) -> None:
        """Answer all held calls, each with a descriptor, and then this one."""
        for held in self.held:
            self.answer(held, "h", 0, fds=[os.open("/dev/null", os.O_RDONLY)])
        self.held.clear()
        self.answer(call)

    def on_write(self, call: Message) -> None:
        """Write a text to a descriptor that came with the call."""
        os.write(call.unix_fds[0], call.body[1].encode())
        os.close(call.unix_fds[0])
        self.answer(call)

    def on_open(self, call: Message) -> None:
        """Return descriptors of pipes from which one of the texts each can be read."""
        fds = []
        for text in call.body[0]:
            reading, writing = os.pipe()
            os.write(writing, text.encode())
            os.close(writing)
            fds.append(reading)
        self.answer(call, "ah", list(range(len(fds))), fds=fds)

    def on_tick(self, call: Message) -> None:
        """Send numbered signals to everybody, from the path given, and then answer."""
        first, last, path = call.body
        for number in range(first, last):
            self.tick(number, path)
        self.answer(call)

    def on_whisper(self, call: Message) -> None:
        """Send a signal to the caller alone, which did not ask for it."""
        self.tick(call.body[0], destination=call.sender)
        self.answer(call)

    def on_callback(self, call: Message) -> None:
        """Call the caller; return the name of the error that it answers with."""
        back = Message(call.sender, "/", INTERFACE, "Anything")
        self.send(back)
        while (answer := self.receive()).reply_serial != back.serial:
            pass
        self.answer(call, "s", answer.error_name)

    def on_leave(self, call: Message) -> None:
        """End without an answer."""
        sys.exit()


if __name__ == "__main__":
    peer = Peer(sys.argv[1])
    # Nobody else has the name: 1 says that it is ours.
    assert peer.call_bus("RequestName", "su", sys.argv[2], 4).body == [1]
    print("ready", flush=True)
    peer.serve()
