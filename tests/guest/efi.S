/*
 * A program that UEFI boots, as \EFI\BOOT\BOOTX64.EFI: it writes `count N` to the first serial port, 25 times a second.
 *
 * gcc -nostdlib -static -Wl,-Ttext=0,--oformat=binary,--build-id=none
 *
 * The headers are those of the PE format, the places of services those of the UEFI specification (EFI_BOOT_SERVICES).
 */
    .set PAGE, 0x1000
    .set HEADERS, 0x200

    .globl _start
_start:
    .ascii "MZ"
    .org 0x3c
    .long pe
pe:
    .ascii "PE\0\0"
    .word 0x8664, 1                     /* x86-64, one section */
    .long 0, 0, 0
    .word section - optional, 0x22      /* executable, large addresses */
optional:
    .word 0x20b, 0
    .long end - code, 0, 0
    .long PAGE, PAGE                    /* entry point, code */
    .quad 0
    .long PAGE, HEADERS                 /* alignment of sections, in the file */
    .long 0, 0, 0, 0
    .long 2 * PAGE, HEADERS, 0          /* size of all, of headers */
    .word 10, 0                         /* an EFI application */
    .quad 0, 0, 0, 0
    .long 0, 6
    .fill 6, 8, 0
section:
    .ascii ".text\0\0\0"
    .long end - code, PAGE, end - code, HEADERS
    .long 0, 0, 0, 0xe0000020           /* code: read, write, execute */

    .org HEADERS
code:
    pushq %rbx
    subq $32, %rsp
    movq 0x60(%rdx), %rbx               /* SystemTable->BootServices */
again:
    incl count(%rip)
    leaq word(%rip), %rsi
    call say
    movl count(%rip), %eax
    call say_number
    movb $'\n', %al
    call put
    movl $40000, %ecx                   /* microseconds */
    call *0xf8(%rbx)                    /* Stall */
    jmp again

put:
    pushq %rax
    movw $0x3fd, %dx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    popq %rax
    movw $0x3f8, %dx
    outb %al, %dx
    ret

say:
    lodsb
    testb %al, %al
    jz 1f
    call put
    jmp say
1:  ret

say_number:
    xorl %edx, %edx
    movl $10, %ecx
    divl %ecx
    pushq %rdx
    testl %eax, %eax
    jz 1f
    call say_number
1:  popq %rax
    addb $'0', %al
    jmp put

word:
    .asciz "count "
count:
    .long 0
    .balign HEADERS
end:
